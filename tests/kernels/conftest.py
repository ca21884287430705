"""What tests of compiled kernels have in common."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from slipstream.kernels.launch import HAS_TRITON
from slipstream.tests.kernels.compiling_ahead import CompilingAhead
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


_LAST = "test_every_kernel_compiles_for_every_target"
_compiling: list[CompilingAhead] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave what takes minutes of the compiler's to the end: it runs beside all others."""
    items.sort(key=lambda item: item.name == _LAST)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin to compile, if that is among the tests."""
    is_wanted = any(item.name == _LAST for item in session.items) and not session.config.option.collectonly
    if is_wanted and HAS_TRITON:
        _compiling.append(CompilingAhead())


def pytest_sessionfinish() -> None:
    """Leave nothing running."""
    while _compiling:
        _compiling.pop().end()


@pytest.fixture
def compiling_ahead() -> CompilingAhead:
    """The compiler that has been running since the tests were collected."""
    return _compiling[0]
