"""Decode attention over the paged cache: rows of one token, their keys cut into spans that programs share.

``decode_partials`` computes what each row gets of each of its spans; ``attention_merge`` puts a row's together.

Shapes: T tokens, N query heads, K KV heads, D head size, R rows, B blocks of a row, C items; a layer's cache is
[2, num_blocks, K, block_size, D].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .attention_items import DecodeItems
from .attention_merge import merge_partials
from .attention_span import (
    NO_WINDOW,
    SPAN_KEYS,
    AttentionOptions,
    Partials,
    attend_keys,
    attend_reference,
    empty_partials,
)
from .backends import uses_triton
from .compile_case import CompileCase, pointer, targets_for
from .launch import KernelConfig, jit, launch, next_power_of_2, processors, tl

TILE_ROWS = 16
"""Query heads that are multiplied with a KV head's keys at once: the least that matrix units take."""


def decode_attention_reference(
    q_TND: Tensor, layer_cache: Tensor, items: DecodeItems, options: AttentionOptions, out_TND: Tensor
) -> None:
    """Write each row's attention over its sequence's keys up to its own position, within the window.

    Query head n belongs to KV head n // (N / K). Rows at position -1 become zeros; tokens that no row stands at are
    left alone.

    Shapes: q_TND, out_TND [tokens, query heads, head size]; layer_cache [2, blocks, KV heads, block size, head size]
    of q's type or float8_e4m3fn
    Source: PagedAttention (arXiv 2309.06180), section 4
    """
    block_size = layer_cache.shape[3]
    for row, (position, token) in enumerate(zip(items.positions_R.tolist(), items.tokens_R.tolist(), strict=True)):
        lowest = max(position - (options.window or NO_WINDOW) + 1, 0)
        keys_L = torch.arange(lowest, position + 1, device=q_TND.device)
        blocks_L = items.tables_RB[row, keys_L // block_size].long()
        stored_2LKD = layer_cache[:, blocks_L, :, keys_L % block_size].transpose(0, 1)
        is_seen_1L = torch.ones((1, len(keys_L)), dtype=torch.bool, device=q_TND.device)
        out_TND[token] = attend_reference(
            q_TND[token : token + 1], stored_2LKD[0], stored_2LKD[1], is_seen_1L, options
        )[0]


@jit
def _attention_decode_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    positions_ptr,
    tokens_ptr,
    first_items_ptr,
    items_ptr,
    item_count_ptr,
    results_ptr,
    peaks_ptr,
    totals_ptr,
    q_stride,
    columns,
    capacity,
    kv_heads,
    window,
    scale,
    soft_cap,
    HAS_SOFT_CAP: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPAN_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program computes items, each as far from the last as there are programs, for BLOCK_M heads of a KV head."""
    PARTS: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    kv_head = tl.program_id(0) // PARTS
    heads = kv_heads * GROUP
    in_group_M = tl.program_id(0) % PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
    head_M = kv_head * GROUP + in_group_M
    d_D = tl.arange(0, BLOCK_D)
    is_there_MD = (in_group_M < GROUP)[:, None] & (d_D < HEAD_SIZE)[None, :]
    first_number = kv_head * (BLOCK_SIZE * HEAD_SIZE)
    for item in range(tl.program_id(1), tl.load(item_count_ptr), tl.num_programs(1)):
        row = tl.load(items_ptr + item)
        span = tl.load(items_ptr + capacity + item)
        position = tl.load(positions_ptr + row)
        lowest = tl.maximum(position - window + 1, 0)
        token = tl.load(tokens_ptr + row).to(tl.int64)
        q_MD = tl.load(
            q_ptr + token * q_stride + head_M[:, None] * HEAD_SIZE + d_D[None, :], mask=is_there_MD, other=0.0
        )
        result_MD, peak_M, total_M = attend_keys(
            q_MD,
            tl.zeros((BLOCK_M, BLOCK_D), tl.float32),
            tl.full((BLOCK_M,), float("-inf"), tl.float32),
            tl.zeros((BLOCK_M,), tl.float32),
            keys_ptr + first_number,
            values_ptr + first_number,
            tables_ptr + row.to(tl.int64) * columns,
            tl.maximum(span * SPAN_KEYS, lowest),
            tl.minimum((span + 1) * SPAN_KEYS, position + 1),
            lowest,
            position,
            kv_heads,
            scale,
            soft_cap,
            HAS_SOFT_CAP,
            HEAD_SIZE,
            BLOCK_SIZE,
            BLOCK_N,
            BLOCK_D,
            MASKED=True,
            ROWS_DIFFER=False,
        )
        partial = tl.load(first_items_ptr + row) + span - lowest // SPAN_KEYS
        place_M = partial.to(tl.int64) * heads + head_M
        tl.store(results_ptr + place_M[:, None] * HEAD_SIZE + d_D[None, :], result_MD, mask=is_there_MD)
        tl.store(peaks_ptr + place_M, peak_M, mask=in_group_M < GROUP)
        tl.store(totals_ptr + place_M, total_M, mask=in_group_M < GROUP)


TYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float8_e4m3fn),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
)
"""Of queries, and of the cache that they can attend to."""

# Keys of a tile, warps and stages, by numbers of a head and bytes of a cached number: some four programs share a
# processor.
_TILES = {
    (64, 1): (64, 4, 5),
    (128, 1): (32, 4, 5),
    (256, 1): (32, 4, 3),
    (64, 2): (128, 4, 3),
    (128, 2): (64, 4, 3),
    (256, 2): (32, 4, 3),
    (64, 4): (32, 4, 3),
    (128, 4): (16, 4, 3),
    (256, 4): (16, 8, 3),
}


def attention_decode_configs(head_size: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> Sequence[KernelConfig]:
    """Return how items can be computed, the default first. Heads are filled up to 64, 128 or 256 numbers.

    Raises: ValueError for a float8 cache under other queries than bfloat16
    """
    check_types(dtype, cache_dtype)
    block = filled_head(head_size)
    choices = [_TILES[block, cache_dtype.itemsize]]
    if block == 128 and dtype is torch.bfloat16:
        # Fewer programs on a processor, each of which reads further ahead.
        choices.append((64, 4, 5))
    return tuple(
        KernelConfig(
            tiles={"BLOCK_M": TILE_ROWS, "BLOCK_N": keys, "BLOCK_D": block}, num_warps=warps, num_stages=stages
        )
        for keys, warps, stages in choices
    )


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``decode_partials`` launches: heads of 80, 96 and 192 numbers are filled up to 128 and 256."""
    for dtype, cache_dtype in TYPES:
        for size in (64, 128, 256):
            for config in attention_decode_configs(size, dtype, cache_dtype):
                yield _case(dtype, cache_dtype, size, config)


def _case(dtype: torch.dtype, cache_dtype: torch.dtype, head_size: int, config: KernelConfig) -> CompileCase:
    plain = ("q_stride", "columns", "capacity", "kv_heads", "window")
    places = ("tables_ptr", "positions_ptr", "tokens_ptr", "first_items_ptr", "items_ptr", "item_count_ptr")
    return CompileCase(
        kernel=_attention_decode_kernel,
        name=f"{pointer(dtype)[1:]} over {pointer(cache_dtype)[1:]} {head_size}",
        config=config,
        signature={
            "q_ptr": pointer(dtype),
            **dict.fromkeys(("keys_ptr", "values_ptr"), pointer(cache_dtype)),
            **dict.fromkeys(places, "*i32"),
            **dict.fromkeys(("results_ptr", "peaks_ptr", "totals_ptr"), "*fp32"),
            **dict.fromkeys(plain, "i32"),
            **dict.fromkeys(("scale", "soft_cap"), "fp32"),
        },
        constants={
            "HAS_SOFT_CAP": False,
            "GROUP": 4,
            "HEAD_SIZE": head_size,
            "BLOCK_SIZE": 16,
            "SPAN_KEYS": SPAN_KEYS,
        },
        targets=targets_for(dtype, cache_dtype),
    )


def decode_partials(
    q_TND: Tensor,
    layer_cache: Tensor,
    items: DecodeItems,
    options: AttentionOptions,
    partials: Partials,
    config: KernelConfig | None = None,
) -> None:
    """Compute the items' partials by the kernel; those of spans that no item has are left alone. Needs Triton.

    Shapes: see ``decode_attention_reference``; q_TND with heads side by side, layer_cache[i] contiguous
    """
    checked_cache(q_TND, layer_cache)
    _, _, kv_heads, block_size, head_size = layer_cache.shape
    group = q_TND.shape[1] // kv_heads
    q_TND = side_by_side(q_TND)
    capacity = items.items_2C.shape[1]
    launch(
        _attention_decode_kernel,
        (kv_heads * -(-group // TILE_ROWS), min(capacity, 4 * processors(q_TND.device))),
        config or attention_decode_configs(head_size, q_TND.dtype, layer_cache.dtype)[0],
        q_ptr=q_TND,
        keys_ptr=layer_cache[0],
        values_ptr=layer_cache[1],
        tables_ptr=items.tables_RB,
        positions_ptr=items.positions_R,
        tokens_ptr=items.tokens_R,
        first_items_ptr=items.first_items_R1,
        items_ptr=items.items_2C,
        item_count_ptr=items.item_count_1,
        results_ptr=partials.results_CND,
        peaks_ptr=partials.peaks_CN,
        totals_ptr=partials.totals_CN,
        q_stride=q_TND.stride(0),
        columns=items.tables_RB.shape[1],
        capacity=capacity,
        kv_heads=kv_heads,
        window=options.window or NO_WINDOW,
        scale=options.scale * options.k_scale,
        soft_cap=options.soft_cap or 0.0,
        HAS_SOFT_CAP=options.soft_cap is not None,
        GROUP=group,
        HEAD_SIZE=head_size,
        BLOCK_SIZE=block_size,
        SPAN_KEYS=SPAN_KEYS,
    )


def decode_attention(
    q_TND: Tensor,
    layer_cache: Tensor,
    items: DecodeItems,
    options: AttentionOptions,
    out_TND: Tensor,
    config: KernelConfig | None = None,
) -> None:
    """As ``decode_attention_reference``; ``out_TND`` contiguous, ``config`` one of ``attention_decode_configs``.

    The items must have been built with the options' window. A row's bits depend on its own keys alone.
    """
    if not uses_triton("attention", q_TND):
        decode_attention_reference(q_TND, layer_cache, items, options, out_TND)
        return
    _, heads, head_size = q_TND.shape
    partials = empty_partials(items.partials, heads, head_size, q_TND.device)
    decode_partials(q_TND, layer_cache, items, options, partials, config)
    merge_partials(partials, items.first_items_R1, items.tokens_R, options, out_TND)


def checked_cache(q_TND: Tensor, layer_cache: Tensor) -> None:
    """Hold a layer's cache against queries. Raises: ValueError naming what does not fit"""
    _, heads, head_size = q_TND.shape
    if layer_cache.dim() != 5 or layer_cache.shape[4] != head_size or heads % layer_cache.shape[2]:
        raise ValueError(
            f"layer_cache {tuple(layer_cache.shape)} does not fit queries {tuple(q_TND.shape)}: "
            f"[2, blocks, KV heads, block size, {head_size}] is needed, KV heads a divisor of {heads}"
        )
    check_types(q_TND.dtype, layer_cache.dtype)
    if not layer_cache[0].is_contiguous():
        raise ValueError(f"layer_cache has strides {layer_cache.stride()}: keys and values must each be contiguous")


def filled_head(head_size: int) -> int:
    """Return what a head is filled up to: 64, 128 or 256 numbers. Raises: ValueError for longer ones"""
    if head_size > 256:
        raise ValueError(f"heads of {head_size} numbers: at most 256 are computed with")
    return max(64, next_power_of_2(head_size))


def check_types(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """Refuse types that no kernel is compiled for. Raises: ValueError naming those that there are"""
    if (dtype, cache_dtype) not in TYPES:
        known = ", ".join(f"{one} over {other}".replace("torch.", "") for one, other in TYPES)
        raise ValueError(f"queries are {dtype}, layer_cache {cache_dtype}: use {known}")


def side_by_side(q_TND: Tensor) -> Tensor:
    """Return queries with their heads side by side; tokens may stand anywhere."""
    _, _, head_size = q_TND.shape
    return q_TND if q_TND.stride(2) == 1 and q_TND.stride(1) == head_size else q_TND.contiguous()
