"""Prefill attention over the paged cache: rows of several tokens behind what is cached of their sequences, all in one
launch, each program a tile of queries of one KV head.

By default a tile goes over its keys in one sweep. Tiles of decoding's size, which ``deterministic`` asks for, go span
by span, so that a position has the same bits whether it is decoded or part of a chunk. Both ways a position's bits do
not depend on the chunk that it is computed in.

Shapes: T tokens, N query heads, K KV heads, D head size, R rows, M rows of a tile (queries and their query heads).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .attention_decode import (
    TILE_ROWS,
    TYPES,
    attention_decode_configs,
    checked_cache,
    side_by_side,
)
from .attention_items import PrefillItems
from .attention_merge import sinks_or_none
from .attention_prefill_tiles import TILES, attention_prefill_config, prefill_tile_rows, swept_config
from .attention_span import (
    NO_WINDOW,
    SPAN_KEYS,
    AttentionOptions,
    attend_keys,
    attend_reference,
    finish_rows,
    merge_partial,
)
from .backends import uses_triton
from .compile_case import CompileCase, pointer, targets_for
from .launch import KernelConfig, jit, launch, tl
from .tiles import rounded


def prefill_attention_reference(
    q_TND: Tensor, layer_cache: Tensor, items: PrefillItems, options: AttentionOptions, out_TND: Tensor
) -> None:
    """Write the causal attention of each row's tokens over its sequence's keys, those cached before included.

    Token i of a row stands at position starts_R + i. Tokens of no row are left alone.

    Shapes: as in ``attention_decode.decode_attention_reference``
    Source: PagedAttention (arXiv 2309.06180), section 4
    """
    block_size = layer_cache.shape[3]
    rows = zip(items.starts_R.tolist(), items.counts_R.tolist(), items.first_tokens_R.tolist(), strict=True)
    for row, (start, count, first_token) in enumerate(rows):
        lowest = max(start - (options.window or NO_WINDOW) + 1, 0)
        keys_L = torch.arange(lowest, start + count, device=q_TND.device)
        blocks_L = items.tables_RB[row, keys_L // block_size].long()
        stored_2LKD = layer_cache[:, blocks_L, :, keys_L % block_size].transpose(0, 1)
        distance_TL = (start + torch.arange(count, device=q_TND.device))[:, None] - keys_L
        is_seen_TL = (distance_TL >= 0) & (distance_TL < (options.window or NO_WINDOW))
        own = slice(first_token, first_token + count)
        out_TND[own] = attend_reference(q_TND[own], stored_2LKD[0], stored_2LKD[1], is_seen_TL, options)


@jit
def _attend_by_spans(
    q_MD,
    keys_ptr,
    values_ptr,
    table_ptr,
    begin,
    end,
    lowest_M,
    position_M,
    kv_heads,
    scale,
    soft_cap,
    HAS_SOFT_CAP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPAN_KEYS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Let a tile's rows attend to their keys span by span, merged as decoding's partials are."""
    result_MD = tl.zeros((q_MD.shape[0], BLOCK_D), tl.float32)
    peak_M = tl.full((q_MD.shape[0],), float("-inf"), tl.float32)
    total_M = tl.zeros((q_MD.shape[0],), tl.float32)
    for span in range(begin // SPAN_KEYS, (end + SPAN_KEYS - 1) // SPAN_KEYS):
        span_MD, span_peak_M, span_total_M = attend_keys(
            q_MD,
            tl.zeros((q_MD.shape[0], BLOCK_D), tl.float32),
            tl.full((q_MD.shape[0],), float("-inf"), tl.float32),
            tl.zeros((q_MD.shape[0],), tl.float32),
            keys_ptr,
            values_ptr,
            table_ptr,
            tl.maximum(span * SPAN_KEYS, begin),
            tl.minimum((span + 1) * SPAN_KEYS, end),
            lowest_M,
            position_M,
            kv_heads,
            scale,
            soft_cap,
            HAS_SOFT_CAP,
            HEAD_SIZE,
            BLOCK_SIZE,
            BLOCK_N,
            BLOCK_D,
            MASKED=True,
            ROWS_DIFFER=True,
        )
        result_MD, peak_M, total_M = merge_partial(result_MD, peak_M, total_M, span_MD, span_peak_M, span_total_M)
    return result_MD, peak_M, total_M


@jit
def _attend_in_one_sweep(
    q_MD,
    keys_ptr,
    values_ptr,
    table_ptr,
    first_position,
    end,
    lowest_M,
    position_M,
    window,
    kv_heads,
    scale,
    soft_cap,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Let a tile's rows, at ``first_position`` to before ``end``, attend to their keys.

    Whole tiles of keys that all rows see need no mask; those before them (with a window) and behind them do.
    """
    result_MD = tl.zeros((q_MD.shape[0], BLOCK_D), tl.float32)
    peak_M = tl.full((q_MD.shape[0],), float("-inf"), tl.float32)
    total_M = tl.zeros((q_MD.shape[0],), tl.float32)
    # What the first row sees begins first; the last one sees most.
    begin = tl.maximum(first_position - window + 1, 0)
    whole_begin = (tl.maximum(end - window, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    whole_end = tl.maximum((first_position + 1) // BLOCK_N * BLOCK_N, whole_begin)
    FIRST: tl.constexpr = 0 if HAS_WINDOW else 1
    for part in tl.static_range(FIRST, 3):
        result_MD, peak_M, total_M = attend_keys(
            q_MD,
            result_MD,
            peak_M,
            total_M,
            keys_ptr,
            values_ptr,
            table_ptr,
            begin if part == 0 else whole_begin if part == 1 else whole_end,
            tl.minimum(whole_begin, end) if part == 0 else whole_end if part == 1 else end,
            lowest_M,
            position_M,
            kv_heads,
            scale,
            soft_cap,
            HAS_SOFT_CAP,
            HEAD_SIZE,
            BLOCK_SIZE,
            BLOCK_N,
            BLOCK_D,
            MASKED=part != 1,
            ROWS_DIFFER=part != 1,
        )
    return result_MD, peak_M, total_M


@jit
def _attention_prefill_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    starts_ptr,
    counts_ptr,
    first_tokens_ptr,
    tiles_ptr,
    tile_count_ptr,
    sinks_ptr,
    out_ptr,
    q_stride,
    columns,
    capacity,
    kv_heads,
    window,
    scale,
    soft_cap,
    v_scale,
    BY_SPANS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPAN_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program computes one tile: some queries of a row with the query heads of one KV head, or BLOCK_M of them."""
    tile = tl.program_id(0)
    if tile >= tl.load(tile_count_ptr):
        return
    HEADS: tl.constexpr = GROUP if GROUP < BLOCK_M else BLOCK_M
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    QUERIES: tl.constexpr = BLOCK_M // HEADS
    kv_head, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    row, first_query = tl.load(tiles_ptr + tile), tl.load(tiles_ptr + capacity + tile)
    start, count = tl.load(starts_ptr + row), tl.load(counts_ptr + row)
    m_M, d_D = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    query_M, in_group_M = first_query + m_M // HEADS, part * HEADS + m_M % HEADS
    head_M = kv_head * GROUP + in_group_M
    is_there_M = (m_M < QUERIES * HEADS) & (query_M < count) & (in_group_M < GROUP)
    is_there_MD = is_there_M[:, None] & (d_D < HEAD_SIZE)[None, :]
    token_M = (tl.load(first_tokens_ptr + row) + query_M).to(tl.int64)
    place_MD = head_M[:, None] * HEAD_SIZE + d_D[None, :]
    q_MD = tl.load(q_ptr + token_M[:, None] * q_stride + place_MD, mask=is_there_MD, other=0.0)
    position_M = start + query_M
    lowest_M = tl.maximum(position_M - window + 1, 0)
    end = start + tl.minimum(first_query + QUERIES, count)
    keys_ptr += kv_head * (BLOCK_SIZE * HEAD_SIZE)
    values_ptr += kv_head * (BLOCK_SIZE * HEAD_SIZE)
    tables_ptr += row.to(tl.int64) * columns
    if BY_SPANS:
        result_MD, peak_M, total_M = _attend_by_spans(
            q_MD,
            keys_ptr,
            values_ptr,
            tables_ptr,
            tl.maximum(start + first_query - window + 1, 0),
            end,
            lowest_M,
            position_M,
            kv_heads,
            scale,
            soft_cap,
            HAS_SOFT_CAP,
            HEAD_SIZE,
            BLOCK_SIZE,
            SPAN_KEYS,
            BLOCK_N,
            BLOCK_D,
        )
    else:
        result_MD, peak_M, total_M = _attend_in_one_sweep(
            q_MD,
            keys_ptr,
            values_ptr,
            tables_ptr,
            start + first_query,
            end,
            lowest_M,
            position_M,
            window,
            kv_heads,
            scale,
            soft_cap,
            HAS_WINDOW,
            HAS_SOFT_CAP,
            HEAD_SIZE,
            BLOCK_SIZE,
            BLOCK_N,
            BLOCK_D,
        )
    sink_M = tl.load(sinks_ptr + head_M, mask=is_there_M, other=0.0) if HAS_SINKS else peak_M
    result_MD = finish_rows(result_MD, peak_M, total_M, sink_M, v_scale, HAS_SINKS)
    place_MD += token_M[:, None] * (kv_heads * GROUP * HEAD_SIZE)
    tl.store(out_ptr + place_MD, rounded(result_MD, out_ptr.dtype.element_ty), mask=is_there_MD)


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``prefill_attention`` launches: heads of 80, 96 and 192 numbers are filled up to 128 and 256."""
    for dtype, cache_dtype in TYPES:
        for size in (64, 128, 256):
            if dtype is not torch.float32:
                yield from _swept_cases(dtype, cache_dtype, size)
            # As decoding's tiles, which are the same everywhere.
            config = attention_decode_configs(size, dtype, cache_dtype)[0]
            yield _case(dtype, cache_dtype, size, config, targets_for(dtype, cache_dtype))


def _swept_cases(dtype: torch.dtype, cache_dtype: torch.dtype, head_size: int) -> Iterator[CompileCase]:
    by_config: dict[str, tuple[KernelConfig, list[str]]] = {}
    for target in targets_for(dtype, cache_dtype):
        config = swept_config(head_size, cache_dtype, TILES[target])
        by_config.setdefault(str(config), (config, []))[1].append(target)
    for config, targets in by_config.values():
        yield _case(dtype, cache_dtype, head_size, config, tuple(targets))


def _case(
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    head_size: int,
    config: KernelConfig,
    targets: tuple[str, ...],
) -> CompileCase:
    plain = ("q_stride", "columns", "capacity", "kv_heads", "window")
    places = ("tables_ptr", "starts_ptr", "counts_ptr", "first_tokens_ptr", "tiles_ptr", "tile_count_ptr")
    by_spans = config.tiles["BLOCK_M"] == TILE_ROWS
    return CompileCase(
        kernel=_attention_prefill_kernel,
        name=f"{pointer(dtype)[1:]} over {pointer(cache_dtype)[1:]} {head_size}{' by spans' if by_spans else ''}",
        config=config,
        signature={
            **dict.fromkeys(("q_ptr", "out_ptr"), pointer(dtype)),
            **dict.fromkeys(("keys_ptr", "values_ptr"), pointer(cache_dtype)),
            **dict.fromkeys(places, "*i32"),
            "sinks_ptr": "*fp32",
            **dict.fromkeys(plain, "i32"),
            **dict.fromkeys(("scale", "soft_cap", "v_scale"), "fp32"),
        },
        constants={
            "BY_SPANS": by_spans,
            "HAS_WINDOW": head_size == 128,
            **dict.fromkeys(("HAS_SOFT_CAP", "HAS_SINKS"), False),
            "GROUP": 4,
            "HEAD_SIZE": head_size,
            "BLOCK_SIZE": 16,
            "SPAN_KEYS": SPAN_KEYS,
        },
        targets=targets,
        # On sm_80 heads of 64 numbers leave four words of a span's results no register.
        spill_bytes=16 if by_spans and head_size == 64 else 0,
    )


def prefill_attention(
    q_TND: Tensor, layer_cache: Tensor, items: PrefillItems, options: AttentionOptions, out_TND: Tensor
) -> None:
    """As ``prefill_attention_reference``; ``out_TND`` contiguous.

    Items of ``TILE_ROWS`` rows are computed as decoding computes them.

    Raises: ValueError for items cut into tiles that this type and size of head is not computed in
    """
    if not uses_triton("attention", q_TND):
        prefill_attention_reference(q_TND, layer_cache, items, options, out_TND)
        return
    checked_cache(q_TND, layer_cache)
    _, _, kv_heads, block_size, head_size = layer_cache.shape
    heads = q_TND.shape[1]
    group = heads // kv_heads
    if out_TND.shape != q_TND.shape or not out_TND.is_contiguous():
        raise ValueError(f"out_TND is {tuple(out_TND.shape)}: contiguous {tuple(q_TND.shape)} is needed")
    by_spans = items.tile_rows == TILE_ROWS
    tile_rows = prefill_tile_rows(head_size, q_TND.dtype, layer_cache.dtype, deterministic=by_spans)
    if tile_rows != items.tile_rows:
        raise ValueError(f"items have tiles of {items.tile_rows} rows: cut them by prefill_tile_rows(...), {tile_rows}")
    config = attention_prefill_config(head_size, q_TND.dtype, layer_cache.dtype, q_TND.device, by_spans=by_spans)
    q_TND = side_by_side(q_TND)
    launch(
        _attention_prefill_kernel,
        (items.tiles_2C.shape[1], kv_heads * -(-group // items.tile_rows)),
        config,
        q_ptr=q_TND,
        keys_ptr=layer_cache[0],
        values_ptr=layer_cache[1],
        tables_ptr=items.tables_RB,
        starts_ptr=items.starts_R,
        counts_ptr=items.counts_R,
        first_tokens_ptr=items.first_tokens_R,
        tiles_ptr=items.tiles_2C,
        tile_count_ptr=items.tile_count_1,
        sinks_ptr=sinks_or_none(options.sinks_N, heads, q_TND.device),
        out_ptr=out_TND,
        q_stride=q_TND.stride(0),
        columns=items.tables_RB.shape[1],
        capacity=items.tiles_2C.shape[1],
        kv_heads=kv_heads,
        window=options.window or NO_WINDOW,
        scale=options.scale * options.k_scale,
        soft_cap=options.soft_cap or 0.0,
        v_scale=options.v_scale,
        BY_SPANS=by_spans,
        HAS_WINDOW=options.window is not None,
        HAS_SOFT_CAP=options.soft_cap is not None,
        HAS_SINKS=options.sinks_N is not None,
        GROUP=group,
        HEAD_SIZE=head_size,
        BLOCK_SIZE=block_size,
        SPAN_KEYS=SPAN_KEYS,
    )
