"""Kernels in Triton's interpreter: memory that nobody wrote is poisoned, launches are held against compiled cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream.kernels import backends
from slipstream.kernels.catalogue import MODULES, cases_of
from slipstream.kernels.compile_case import pointer
from slipstream.kernels.launch import HAS_TRITON, KernelConfig, observed_launches


@pytest.fixture(autouse=True)
def _by_triton() -> Iterator[None]:
    """Let every operation be carried out by its kernel."""
    if not HAS_TRITON:
        pytest.skip("no Triton here: pip install triton")
    backends.use("triton")
    yield
    backends.use("auto")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill memory that is allocated without being written (``torch.empty``) with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def launches() -> Iterator[list[str]]:
    """Hold each launch against the cases that are compiled ahead of time; the names of the kernels that were launched.

    A launch without a case of its configuration and of its pointers' types has never been compiled for a GPU.
    """
    seen: list[str] = []

    def look(kernel: Any, config: KernelConfig, arguments: Mapping[str, Any]) -> None:
        seen.append(kernel.__name__)
        types = {name: pointer(each.dtype) for name, each in arguments.items() if isinstance(each, Tensor)}
        assert (config, tuple(sorted(types.items()))) in _compiled(kernel.__name__), (
            f"no compile case of {kernel.__name__} has {config} and {types}"
        )

    with observed_launches(look):
        yield seen


@lru_cache
def _compiled(kernel: str) -> list[tuple[KernelConfig, tuple[tuple[str, str], ...]]]:
    cases = [case for module in MODULES for case in cases_of(module) if case.kernel.__name__ == kernel]
    return [
        (case.config, tuple(sorted((name, type) for name, type in case.signature.items() if type.startswith("*"))))
        for case in cases
    ]
