"""Decode attention with shared prefixes: what several rows have in common is read once, as a matrix product.

Rows of a shared span and their query heads fill one tile; what each gets of the span is a partial as any other, at its
place among the row's partials. The rest of the rows' spans is ``attention_decode``'s, and one merge puts all together:
the result is exact. In tiles of ``TILE_ROWS`` rows a row's bits are those that it has alone.

Shapes: as in ``attention_decode``; S members of shared spans.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .attention_decode import (
    TYPES,
    attention_decode_configs,
    checked_cache,
    decode_attention_reference,
    decode_partials,
    side_by_side,
)
from .attention_merge import merge_partials
from .attention_span import NO_WINDOW, SPAN_KEYS, AttentionOptions, Partials, attend_keys, empty_partials
from .backends import uses_triton
from .compile_case import CompileCase, pointer
from .launch import KernelConfig, jit, launch, next_power_of_2, processors, tl
from .shared_items import SharedItems


@jit
def _attend_span(
    q_MD,
    keys_ptr,
    values_ptr,
    table_ptr,
    begin,
    kv_heads,
    scale,
    soft_cap,
    HAS_SOFT_CAP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPAN_KEYS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return the partial of a tile's rows with a whole span that all of them see: nothing is masked."""
    BLOCK_M: tl.constexpr = q_MD.shape[0]
    BLOCK_D: tl.constexpr = q_MD.shape[1]
    return attend_keys(
        q_MD,
        tl.zeros((BLOCK_M, BLOCK_D), tl.float32),
        tl.full((BLOCK_M,), float("-inf"), tl.float32),
        tl.zeros((BLOCK_M,), tl.float32),
        keys_ptr,
        values_ptr,
        table_ptr,
        begin,
        begin + SPAN_KEYS,
        0,
        0,
        kv_heads,
        scale,
        soft_cap,
        HAS_SOFT_CAP,
        HEAD_SIZE,
        BLOCK_SIZE,
        BLOCK_N,
        BLOCK_D,
        MASKED=False,
        ROWS_DIFFER=False,
    )


@jit
def _shared_prefix_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    positions_ptr,
    tokens_ptr,
    first_items_ptr,
    members_ptr,
    tiles_ptr,
    tile_count_ptr,
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
    """One program computes tiles, each some rows of a shared span with the query heads of one KV head."""
    HEADS: tl.constexpr = GROUP if GROUP < BLOCK_M else BLOCK_M
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = tl.program_id(0) // PARTS
    m_M = tl.arange(0, BLOCK_M)
    member_M = m_M // HEADS
    in_group_M = tl.program_id(0) % PARTS * HEADS + m_M % HEADS
    head_M, d_D = kv_head * GROUP + in_group_M, tl.arange(0, BLOCK_D)
    first_number = kv_head * (BLOCK_SIZE * HEAD_SIZE)
    for tile in range(tl.program_id(1), tl.load(tile_count_ptr), tl.num_programs(1)):
        table_ptr = tables_ptr + tl.load(tiles_ptr + tile).to(tl.int64) * columns
        span = tl.load(tiles_ptr + capacity + tile)
        first_member = tl.load(tiles_ptr + 2 * capacity + tile)
        is_there_M = (member_M < tl.load(tiles_ptr + 3 * capacity + tile)) & (in_group_M < GROUP)
        is_there_MD = is_there_M[:, None] & (d_D < HEAD_SIZE)[None, :]
        row_M = tl.load(members_ptr + first_member + member_M, mask=is_there_M, other=0)
        token_M = tl.load(tokens_ptr + row_M, mask=is_there_M, other=0).to(tl.int64)
        q_ptrs = q_ptr + token_M[:, None] * q_stride + head_M[:, None] * HEAD_SIZE + d_D[None, :]
        q_MD = tl.load(q_ptrs, mask=is_there_MD, other=0.0)
        result_MD, peak_M, total_M = _attend_span(
            q_MD,
            keys_ptr + first_number,
            values_ptr + first_number,
            table_ptr,
            span * SPAN_KEYS,
            kv_heads,
            scale,
            soft_cap,
            HAS_SOFT_CAP,
            HEAD_SIZE,
            BLOCK_SIZE,
            SPAN_KEYS,
            BLOCK_N,
        )
        lowest_M = tl.maximum(tl.load(positions_ptr + row_M, mask=is_there_M, other=0) - window + 1, 0)
        first_item_M = tl.load(first_items_ptr + row_M, mask=is_there_M, other=0)
        place_M = (first_item_M + span - lowest_M // SPAN_KEYS).to(tl.int64) * (kv_heads * GROUP) + head_M
        tl.store(results_ptr + place_M[:, None] * HEAD_SIZE + d_D[None, :], result_MD, mask=is_there_MD)
        tl.store(peaks_ptr + place_M, peak_M, mask=is_there_M)
        tl.store(totals_ptr + place_M, total_M, mask=is_there_M)


def shared_prefix_config(
    head_size: int, dtype: torch.dtype, cache_dtype: torch.dtype, *, deterministic: bool
) -> KernelConfig:
    """Return how shared spans are computed; ``deterministic``: as decoding computes a row's own."""
    if deterministic:
        return attention_decode_configs(head_size, dtype, cache_dtype)[0]
    block = max(64, next_power_of_2(head_size))
    if dtype is torch.float32:
        # Numbers of 8 bits on their way to float32 take the registers of a second stage.
        stages = 2 if cache_dtype is torch.float32 else 1
        return KernelConfig(tiles={"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_D": block}, num_warps=8, num_stages=stages)
    keys, warps = 64 if block <= 128 else 32, 4 if block == 64 else 8
    return KernelConfig(tiles={"BLOCK_M": 64, "BLOCK_N": keys, "BLOCK_D": block}, num_warps=warps, num_stages=3)


def shared_tile_rows(head_size: int, dtype: torch.dtype, cache_dtype: torch.dtype, *, deterministic: bool) -> int:
    """Return the rows of a tile that ``share_items`` is to cut into."""
    return shared_prefix_config(head_size, dtype, cache_dtype, deterministic=deterministic).tiles["BLOCK_M"]


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``shared_partials`` launches."""
    for dtype, cache_dtype in TYPES:
        # Heads of 80, 96 and 192 numbers are filled up to 128 and 256.
        for size in (64, 128, 256):
            for deterministic in (False, True):
                yield _case(dtype, cache_dtype, size, deterministic=deterministic)


def _case(dtype: torch.dtype, cache_dtype: torch.dtype, head_size: int, *, deterministic: bool) -> CompileCase:
    places = ("tables_ptr", "positions_ptr", "tokens_ptr", "first_items_ptr", "members_ptr", "tiles_ptr")
    is_float8 = cache_dtype is torch.float8_e4m3fn
    return CompileCase(
        kernel=_shared_prefix_kernel,
        name=f"{pointer(dtype)[1:]} over {pointer(cache_dtype)[1:]} {head_size}{' alone' if deterministic else ''}",
        config=shared_prefix_config(head_size, dtype, cache_dtype, deterministic=deterministic),
        signature={
            "q_ptr": pointer(dtype),
            **dict.fromkeys(("keys_ptr", "values_ptr"), pointer(cache_dtype)),
            **dict.fromkeys((*places, "tile_count_ptr"), "*i32"),
            **dict.fromkeys(("results_ptr", "peaks_ptr", "totals_ptr"), "*fp32"),
            **dict.fromkeys(("q_stride", "columns", "capacity", "kv_heads", "window"), "i32"),
            **dict.fromkeys(("scale", "soft_cap"), "fp32"),
        },
        constants={
            "HAS_SOFT_CAP": False,
            "GROUP": 4,
            "HEAD_SIZE": head_size,
            "BLOCK_SIZE": 16,
            "SPAN_KEYS": SPAN_KEYS,
        },
        targets=("sm_90", "sm_100", "gfx942") if is_float8 else ("sm_80", "sm_90", "sm_100", "gfx942"),
        # Addresses that are computed before the loop over keys, where its tiles fill the registers.
        spill_bytes=64,
    )


def shared_partials(
    q_TND: Tensor, layer_cache: Tensor, items: SharedItems, options: AttentionOptions, partials: Partials
) -> None:
    """Compute the partials of shared spans; those of the rows' own are left alone. Needs Triton.

    Shapes: see ``decode_attention_reference``
    Raises: ValueError for items cut into tiles that this type and size of head is not computed in
    """
    checked_cache(q_TND, layer_cache)
    _, _, kv_heads, block_size, head_size = layer_cache.shape
    configs = [
        shared_prefix_config(head_size, q_TND.dtype, layer_cache.dtype, deterministic=deterministic)
        for deterministic in (False, True)
    ]
    config = next((each for each in configs if each.tiles["BLOCK_M"] == items.tile_rows), None)
    if config is None:
        raise ValueError(f"items have tiles of {items.tile_rows} rows: cut them into shared_tile_rows(...)")
    group = q_TND.shape[1] // kv_heads
    q_TND = side_by_side(q_TND)
    capacity = items.tiles_4C.shape[1]
    launch(
        _shared_prefix_kernel,
        (kv_heads * -(-group // items.tile_rows), min(capacity, 2 * processors(q_TND.device))),
        config,
        q_ptr=q_TND,
        keys_ptr=layer_cache[0],
        values_ptr=layer_cache[1],
        tables_ptr=items.own.tables_RB,
        positions_ptr=items.own.positions_R,
        tokens_ptr=items.own.tokens_R,
        first_items_ptr=items.own.first_items_R1,
        members_ptr=items.members_S,
        tiles_ptr=items.tiles_4C,
        tile_count_ptr=items.tile_count_1,
        results_ptr=partials.results_CND,
        peaks_ptr=partials.peaks_CN,
        totals_ptr=partials.totals_CN,
        q_stride=q_TND.stride(0),
        columns=items.own.tables_RB.shape[1],
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


def shared_decode_attention(
    q_TND: Tensor, layer_cache: Tensor, items: SharedItems, options: AttentionOptions, out_TND: Tensor
) -> None:
    """Write what ``decode_attention`` does, with shared spans read once; ``out_TND`` contiguous.

    Source: Hydragen (arXiv 2402.05099), section 3
    """
    if not uses_triton("attention", q_TND):
        decode_attention_reference(q_TND, layer_cache, items.own, options, out_TND)
        return
    _, heads, head_size = q_TND.shape
    partials = empty_partials(items.own.partials, heads, head_size, q_TND.device)
    shared_partials(q_TND, layer_cache, items, options, partials)
    decode_partials(q_TND, layer_cache, items.own, options, partials)
    merge_partials(partials, items.own.first_items_R1, items.own.tokens_R, options, out_TND)
