"""All files with kernels, and what each of them launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from . import (
    activation,
    kv_blocks,
    kv_pack,
    linear_w4a16,
    linear_w8a8,
    norm,
    norm_quantized,
    quantize_rows,
    rope_kv,
    split_sums,
)
from .compile_case import CompileCase

MODULES: Mapping[str, Callable[[], Iterator[CompileCase]]] = {
    "activation": activation.compile_cases,
    "kv_blocks": kv_blocks.compile_cases,
    "kv_pack": kv_pack.compile_cases,
    "linear_w4a16": linear_w4a16.compile_cases,
    "linear_w8a8": linear_w8a8.compile_cases,
    "norm": norm.compile_cases,
    "norm_quantized": norm_quantized.compile_cases,
    "quantize_rows": quantize_rows.compile_cases,
    "rope_kv": rope_kv.compile_cases,
    "split_sums": split_sums.compile_cases,
}
"""By file: its cases, one for each dtype and tile configuration that its operations can launch."""


def cases_of(module: str) -> list[CompileCase]:
    """Return the cases of a file with kernels."""
    return list(MODULES[module]())
