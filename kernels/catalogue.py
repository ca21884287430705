"""All files with kernels, and what each of them launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from . import logit_edits, norm, sample_tiles, token_logprobs, token_mask
from .compile_case import CompileCase

MODULES: Mapping[str, Callable[[], Iterator[CompileCase]]] = {
    "logit_edits": logit_edits.compile_cases,
    "norm": norm.compile_cases,
    "sample_tiles": sample_tiles.compile_cases,
    "token_logprobs": token_logprobs.compile_cases,
    "token_mask": token_mask.compile_cases,
}
"""By file: its cases, one for each dtype and tile configuration that its operations can launch."""


def cases_of(module: str) -> list[CompileCase]:
    """Return the cases of a file with kernels."""
    return list(MODULES[module]())
