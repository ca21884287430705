"""All files with kernels, and what each of them launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from . import (
    activation,
    attention_decode,
    attention_merge,
    attention_prefill,
    gated,
    kv_blocks,
    kv_pack,
    linear_fixed,
    linear_w4a16,
    linear_w8a8,
    logit_edits,
    mla,
    mla_prefill,
    moe_combine,
    moe_gemm,
    moe_route,
    moe_sort,
    norm,
    norm_quantized,
    quantize_rows,
    rope_kv,
    sample_tiles,
    shared_prefix,
    split_sums,
    token_logprobs,
    token_mask,
    tree_sum,
)
from .compile_case import CompileCase

MODULES: Mapping[str, Callable[[], Iterator[CompileCase]]] = {
    "activation": activation.compile_cases,
    "attention_decode": attention_decode.compile_cases,
    "attention_merge": attention_merge.compile_cases,
    "attention_prefill": attention_prefill.compile_cases,
    "gated": gated.compile_cases,
    "kv_blocks": kv_blocks.compile_cases,
    "kv_pack": kv_pack.compile_cases,
    "linear_fixed": linear_fixed.compile_cases,
    "linear_w4a16": linear_w4a16.compile_cases,
    "linear_w8a8": linear_w8a8.compile_cases,
    "logit_edits": logit_edits.compile_cases,
    "mla": mla.compile_cases,
    "mla_prefill": mla_prefill.compile_cases,
    "moe_combine": moe_combine.compile_cases,
    "moe_gemm": moe_gemm.compile_cases,
    "moe_route": moe_route.compile_cases,
    "moe_sort": moe_sort.compile_cases,
    "norm": norm.compile_cases,
    "norm_quantized": norm_quantized.compile_cases,
    "quantize_rows": quantize_rows.compile_cases,
    "rope_kv": rope_kv.compile_cases,
    "sample_tiles": sample_tiles.compile_cases,
    "shared_prefix": shared_prefix.compile_cases,
    "split_sums": split_sums.compile_cases,
    "token_logprobs": token_logprobs.compile_cases,
    "token_mask": token_mask.compile_cases,
    "tree_sum": tree_sum.compile_cases,
}
"""By file: its cases, one for each dtype and tile configuration that its operations can launch."""


def cases_of(module: str) -> list[CompileCase]:
    """Return the cases of a file with kernels."""
    return list(MODULES[module]())
