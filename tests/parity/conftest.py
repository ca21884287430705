"""What the parity suites have in common."""

from __future__ import annotations

import pytest

from slipstream.runtime import llm as llm_module
from slipstream.runtime.worker.launch import launch_engine
from slipstream.tests.fakes.thread_peers import ThreadPeers


@pytest.fixture
def ranks_are_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the ranks of every ``LLM`` as threads of this process."""
    monkeypatch.setattr(
        llm_module, "launch_engine", lambda options, clock: launch_engine(options, clock=clock, start_peers=ThreadPeers)
    )
