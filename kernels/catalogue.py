"""All files with kernels, and what each of them launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from . import linear_fixed, norm, tree_sum
from .compile_case import CompileCase

MODULES: Mapping[str, Callable[[], Iterator[CompileCase]]] = {
    "linear_fixed": linear_fixed.compile_cases,
    "norm": norm.compile_cases,
    "tree_sum": tree_sum.compile_cases,
}
"""By file: its cases, one for each dtype and tile configuration that its operations can launch."""


def cases_of(module: str) -> list[CompileCase]:
    """Return the cases of a file with kernels."""
    return list(MODULES[module]())
