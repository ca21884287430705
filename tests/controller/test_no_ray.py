"""Nothing on a request's way knows Ray: the processes that serve never load it."""

from __future__ import annotations

import subprocess
import sys

import pytest

SERVING = (
    "slipstream.runtime.worker.main",
    "slipstream.runtime.worker.launch",
    "slipstream.runtime.worker.rank_main",
    "slipstream.runtime.gateway.main",
)
COMMANDS = ("slipstream.runtime.cli", "slipstream.runtime.operations.up", "slipstream.runtime.operations.down")
"""``--help`` and a wrong file are answered before Ray is loaded."""


@pytest.mark.parametrize("module", SERVING + COMMANDS)
def test_a_serving_process_does_not_load_ray(module: str) -> None:
    program = f"import sys, {module}; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", program], timeout=120).returncode == 0
