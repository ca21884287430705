"""Both ways of an operation: with compiled kernels, and by torch's operations alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from slipstream.kernels.native import SWITCH, Native, load, native
from slipstream.kernels.native_build import NativeBuildError


def compiled_or_skip() -> Native:
    """Return the compiled kernels, or skip the test and say why there are none."""
    found = native()
    if found is not None:
        return found
    try:
        load(os.environ)
    except NativeBuildError as error:
        pytest.skip(f"no compiled kernels: {error}")
    pytest.skip(f"compiled kernels are switched off ({SWITCH})")


@contextmanager
def torch_alone() -> Iterator[None]:
    """Switch the compiled kernels off within the block."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "0"
    native.cache_clear()
    try:
        yield
    finally:
        del os.environ[SWITCH]
        if before is not None:
            os.environ[SWITCH] = before
        native.cache_clear()
