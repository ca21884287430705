"""Partials of rows' spans put together: the last part of decode attention, of whichever kernel wrote the partials.

Shapes: R rows, C partials (a row's spans, one row after the other), N query heads, D size of a value, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from .attention_span import LOG2_E, AttentionOptions, Partials, finish_rows, merge_partial
from .backends import uses_triton
from .compile_case import CompileCase, pointer
from .launch import KernelConfig, jit, launch, next_power_of_2, tl
from .tiles import rounded


def merge_partials_reference(
    partials: Partials, first_items_R1: Tensor, tokens_R: Tensor, options: AttentionOptions, out_TND: Tensor
) -> None:
    """Write each row's attention to its place in the batch: its spans' partials, weighted by the whole softmax.

    A row without partials becomes zeros. Of the options, ``sinks_N`` and ``v_scale`` count.

    Shapes: first_items_R1 [rows + 1] int32, the partials before each row's; tokens_R [rows] int32, places in out_TND
    [tokens, query heads, size of a value]
    Source: FlashAttention (arXiv 2205.14135), section 3.1
    """
    bounds = first_items_R1.tolist()
    for row, token in enumerate(tokens_R.tolist()):
        own = slice(bounds[row], bounds[row + 1])
        peaks_CN, totals_CN = partials.peaks_CN[own] / LOG2_E, partials.totals_CN[own]
        results_CND = partials.results_CND[own]
        if options.sinks_N is not None:
            peaks_CN = torch.cat((peaks_CN, options.sinks_N.float()[None]))
            totals_CN = torch.cat((totals_CN, torch.ones_like(peaks_CN[:1])))
            results_CND = torch.cat((results_CND, torch.zeros_like(partials.results_CND[:1])))
        shares_CN = peaks_CN.softmax(0).nan_to_num(nan=0.0)
        total_N = (shares_CN * totals_CN).sum(0)
        result_ND = (shares_CN[..., None] * results_CND).sum(0) / torch.where(total_N == 0, 1, total_N)[:, None]
        out_TND[token] = (result_ND * options.v_scale).to(out_TND.dtype)


@jit
def _attention_merge_kernel(
    results_ptr,
    peaks_ptr,
    totals_ptr,
    first_items_ptr,
    tokens_ptr,
    sinks_ptr,
    out_ptr,
    v_scale,
    HAS_SINKS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """One program merges one row's partials of one query head, in their order.

    ``AT_ONCE`` partials are loaded at once, as one tile; those beyond the last change no bit.
    """
    head, heads, row = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    begin, end = tl.load(first_items_ptr + row), tl.load(first_items_ptr + row + 1)
    ahead_A = tl.arange(0, AT_ONCE)
    d_D = tl.arange(0, BLOCK_D)
    result_1D = tl.zeros((1, BLOCK_D), tl.float32)
    peak_1 = tl.full((1,), float("-inf"), tl.float32)
    total_1 = tl.zeros((1,), tl.float32)
    if end - begin == 1:
        # Merged with nothing it is what it is.
        place = begin.to(tl.int64) * heads + head
        peak_1 = tl.load(peaks_ptr + place + tl.arange(0, 1))
        total_1 = tl.load(totals_ptr + place + tl.arange(0, 1))
        result_1D = tl.load(results_ptr + place * SIZE + d_D, mask=d_D < SIZE, other=0.0)[None, :]
    else:
        for first in range(begin, end, AT_ONCE):
            place_A = (first + ahead_A).to(tl.int64) * heads + head
            is_there_A = first + ahead_A < end
            peaks_A = tl.load(peaks_ptr + place_A, mask=is_there_A, other=float("-inf"))
            totals_A = tl.load(totals_ptr + place_A, mask=is_there_A, other=0.0)
            is_read_AD = is_there_A[:, None] & (d_D < SIZE)[None, :]
            spans_AD = tl.load(results_ptr + place_A[:, None] * SIZE + d_D[None, :], mask=is_read_AD, other=0.0)
            for ahead in tl.static_range(AT_ONCE):
                # A sum with zeros takes one out of a tile.
                span_1D = tl.sum(tl.where((ahead_A == ahead)[:, None], spans_AD, 0.0), axis=0)[None, :]
                span_peak_1 = tl.sum(tl.where(ahead_A == ahead, peaks_A, 0.0), axis=0) + tl.zeros((1,), tl.float32)
                span_total_1 = tl.sum(tl.where(ahead_A == ahead, totals_A, 0.0), axis=0) + tl.zeros((1,), tl.float32)
                result_1D, peak_1, total_1 = merge_partial(
                    result_1D, peak_1, total_1, span_1D, span_peak_1, span_total_1
                )
    sink_1 = peak_1
    if HAS_SINKS:
        sink_1 = tl.load(sinks_ptr + head + tl.arange(0, 1))
    result_1D = finish_rows(result_1D, peak_1, total_1, sink_1, v_scale, HAS_SINKS)
    out_row = tl.load(tokens_ptr + row).to(tl.int64) * heads + head
    tl.store(
        out_ptr + out_row * SIZE + d_D[None, :],
        rounded(result_1D, out_ptr.dtype.element_ty),
        mask=(d_D < SIZE)[None, :],
    )


def attention_merge_config(value_size: int) -> KernelConfig:
    """Return how partials with values of a size are merged: four numbers a thread, eight spans on their way at once."""
    block = max(128, next_power_of_2(value_size))
    return KernelConfig(tiles={"BLOCK_D": block, "AT_ONCE": 8}, num_warps=block // 128, num_stages=1)


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``merge_partials`` launches."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for size in (128, 256, 512):
            yield CompileCase(
                kernel=_attention_merge_kernel,
                name=f"{pointer(dtype)[1:]} {size}",
                config=attention_merge_config(size),
                signature={
                    **dict.fromkeys(("results_ptr", "peaks_ptr", "totals_ptr", "sinks_ptr"), "*fp32"),
                    **dict.fromkeys(("first_items_ptr", "tokens_ptr"), "*i32"),
                    "out_ptr": pointer(dtype),
                    "v_scale": "fp32",
                },
                constants={"HAS_SINKS": True, "SIZE": size},
            )


def merge_partials(
    partials: Partials, first_items_R1: Tensor, tokens_R: Tensor, options: AttentionOptions, out_TND: Tensor
) -> None:
    """As ``merge_partials_reference``; ``out_TND`` contiguous.

    Raises: ValueError for tensors whose shapes do not fit each other
    """
    _, heads, value_size = partials.results_CND.shape
    if out_TND.shape[1:] != (heads, value_size) or not out_TND.is_contiguous():
        raise ValueError(
            f"out_TND is {tuple(out_TND.shape)} with strides {out_TND.stride()}: [tokens, {heads}, {value_size}] "
            "contiguous is needed"
        )
    if first_items_R1.shape != (tokens_R.shape[0] + 1,):
        raise ValueError(f"first_items_R1 has {first_items_R1.shape[0]} numbers for {tokens_R.shape[0]} rows")
    if not uses_triton("attention", out_TND):
        merge_partials_reference(partials, first_items_R1, tokens_R, options, out_TND)
        return
    sinks_N = options.sinks_N
    launch(
        _attention_merge_kernel,
        (heads, tokens_R.shape[0]),
        attention_merge_config(value_size),
        results_ptr=partials.results_CND,
        peaks_ptr=partials.peaks_CN,
        totals_ptr=partials.totals_CN,
        first_items_ptr=first_items_R1,
        tokens_ptr=tokens_R,
        sinks_ptr=sinks_or_none(sinks_N, heads, out_TND.device),
        out_ptr=out_TND,
        v_scale=options.v_scale,
        HAS_SINKS=sinks_N is not None,
        SIZE=value_size,
    )


def sinks_or_none(sinks_N: Tensor | None, heads: int, device: torch.device) -> Tensor:
    """Return sinks as kernels take them: one float32 number a head, side by side; any such where there are none.

    Raises: ValueError for another type or number of them
    """
    if sinks_N is None:
        return _any_number(device)
    if sinks_N.shape != (heads,) or sinks_N.dtype != torch.float32:
        raise ValueError(f"sinks_N is {sinks_N.dtype} {tuple(sinks_N.shape)}: float32 [{heads}] is needed")
    return sinks_N.contiguous()


@lru_cache(maxsize=64)
def _any_number(device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):
        return torch.zeros(1, dtype=torch.float32, device=device)
