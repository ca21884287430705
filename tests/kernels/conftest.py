"""What tests of compiled kernels have in common."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from slipstream.tests.kernels.native_ways import compiled_or_skip


@pytest.fixture
def compiled() -> None:
    """Skip the test, with the reason, where there are no compiled kernels."""
    compiled_or_skip()


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run the test with one thread and with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
