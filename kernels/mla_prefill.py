"""Prefill with multi-head latent attention: chunks of any lengths in one launch, over what the paged cache has.

A tile is some tokens of a chunk with some of their heads. It goes over its keys at once, or, if its bits are to be
those of decoding, span by span. Queries are absorbed as for decoding: keys are read once for all heads, whatever part
of them a cached prefix is.

Shapes: as in ``mla_span``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .attention_items import PrefillItems
from .attention_span import SPAN_KEYS, finish_rows, merge_partial
from .backends import uses_triton
from .compile_case import CompileCase, pointer
from .launch import jit, launch, tl
from .mla_span import (
    MlaOptions,
    attend_latents,
    check_mla,
    load_mla_queries,
    mla_config,
    mla_reference,
    mla_rows,
    mla_variants,
)
from .tiles import rounded


def mla_prefill_tile_rows(heads: int, dtype: torch.dtype, options: MlaOptions) -> int:
    """Return what ``prefill_items`` is to cut tiles for, with all heads those of one KV head."""
    if options.deterministic:
        return mla_rows(heads, dtype, deterministic=True)
    # Tokens fill a tile up.
    return mla_rows(1 << 16, dtype, deterministic=False)


@jit
def _attend_all(
    q_latent_ML,
    q_rope_MR,
    position_M,
    cache_ptr,
    table_ptr,
    end,
    block_size,
    scale,
    IN_SPANS: tl.constexpr,
    SPAN: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return what a tile's rows get of all keys before ``end``: at once, or span by span as decoding merges them."""
    if IN_SPANS:
        result_ML = tl.zeros([BLOCK_M, LATENT], tl.float32)
        peak_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total_M = tl.zeros([BLOCK_M], tl.float32)
        for begin in range(0, end, SPAN):
            span_ML, span_peak_M, span_total_M = attend_latents(
                q_latent_ML,
                q_rope_MR,
                position_M,
                cache_ptr,
                table_ptr,
                begin,
                tl.minimum(begin + SPAN, end),
                block_size,
                scale,
                LATENT,
                ROPE,
                BLOCK_M,
                BLOCK_N,
            )
            result_ML, peak_M, total_M = merge_partial(result_ML, peak_M, total_M, span_ML, span_peak_M, span_total_M)
    else:
        result_ML, peak_M, total_M = attend_latents(
            q_latent_ML,
            q_rope_MR,
            position_M,
            cache_ptr,
            table_ptr,
            0,
            end,
            block_size,
            scale,
            LATENT,
            ROPE,
            BLOCK_M,
            BLOCK_N,
        )
    return result_ML, peak_M, total_M


@jit
def _mla_prefill_kernel(
    q_ptr,
    cache_ptr,
    tables_ptr,
    starts_ptr,
    counts_ptr,
    first_tokens_ptr,
    tiles_ptr,
    tile_count_ptr,
    out_ptr,
    heads,
    tile_queries,
    table_stride,
    block_size,
    scale,
    cache_scale,
    IN_SPANS: tl.constexpr,
    SPAN: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program computes the attention of some heads of some tokens of a chunk, over all of their keys."""
    tile = tl.program_id(0)
    if tile >= tl.load(tile_count_ptr):
        return
    row, first = tl.load(tiles_ptr + tile), tl.load(tiles_ptr + tl.num_programs(0) + tile)
    start, count = tl.load(starts_ptr + row), tl.load(counts_ptr + row)
    token = tl.load(first_tokens_ptr + row).to(tl.int64) + first
    tile_heads = BLOCK_M // tile_queries
    queries_M = tl.arange(0, BLOCK_M) // tile_heads
    heads_M = tl.program_id(1) * tile_heads + tl.arange(0, BLOCK_M) % tile_heads
    is_row_M = (queries_M < tile_queries) & (first + queries_M < count) & (heads_M < heads)
    rows_M = queries_M * heads + heads_M
    q_latent_ML, q_rope_MR = load_mla_queries(q_ptr + token * heads * (LATENT + ROPE), rows_M, is_row_M, LATENT, ROPE)
    position_M = start + tl.minimum(first + queries_M, count - 1)
    table_ptr = tables_ptr + row.to(tl.int64) * table_stride
    end = start + tl.minimum(first + tile_queries, count)
    result_ML, peak_M, total_M = _attend_all(
        q_latent_ML,
        q_rope_MR,
        position_M,
        cache_ptr,
        table_ptr,
        end,
        block_size,
        scale,
        IN_SPANS,
        SPAN,
        LATENT,
        ROPE,
        BLOCK_M,
        BLOCK_N,
    )
    out_ML = finish_rows(result_ML, peak_M, total_M, peak_M, cache_scale, False)
    out_ptrs = out_ptr + token * heads * LATENT + (rows_M[:, None] * LATENT + tl.arange(0, LATENT)[None, :])
    tl.store(out_ptrs, rounded(out_ML, out_ptr.dtype.element_ty), mask=is_row_M[:, None])


def mla_prefill(q_TNW: Tensor, cache_BSW: Tensor, items: PrefillItems, options: MlaOptions, out_TNL: Tensor) -> None:
    """Write the attention of all chunks' tokens to ``out``, as ``mla_reference`` has it.

    Shapes: q_TNW [tokens, heads, latent + rotated]; cache_BSW [blocks, block size, latent + rotated] contiguous, of
    q's type or float8_e4m3fn; out_TNL [tokens, heads, latent] contiguous; other tokens of it are left alone
    Raises: ValueError
    """
    check_mla(q_TNW, cache_BSW, options, out_TNL)
    heads, width = q_TNW.shape[1:]
    rows = mla_prefill_tile_rows(heads, q_TNW.dtype, options)
    if rows != items.tile_rows:
        raise ValueError(
            f"items have tiles of {items.tile_rows} rows: cut them into mla_prefill_tile_rows(...), {rows}"
        )
    queries = rows // min(heads, rows)
    if not uses_triton("mla", q_TNW):
        _by_reference(q_TNW, cache_BSW, items, options, out_TNL)
        return
    launch(
        _mla_prefill_kernel,
        (items.tiles_2C.shape[1], -(-heads // (rows // queries))),
        mla_config(rows, q_TNW.dtype),
        q_ptr=q_TNW.contiguous(),
        cache_ptr=cache_BSW,
        tables_ptr=items.tables_RB,
        starts_ptr=items.starts_R,
        counts_ptr=items.counts_R,
        first_tokens_ptr=items.first_tokens_R,
        tiles_ptr=items.tiles_2C,
        tile_count_ptr=items.tile_count_1,
        out_ptr=out_TNL,
        heads=heads,
        tile_queries=queries,
        table_stride=items.tables_RB.shape[1],
        block_size=cache_BSW.shape[1],
        scale=options.scale * options.cache_scale,
        cache_scale=options.cache_scale,
        IN_SPANS=options.deterministic,
        SPAN=SPAN_KEYS,
        LATENT=options.latent,
        ROPE=width - options.latent,
    )


def _by_reference(q_TNW: Tensor, cache_BSW: Tensor, items: PrefillItems, options: MlaOptions, out_TNL: Tensor) -> None:
    for table_B, start, count, token in zip(
        items.tables_RB, items.starts_R.tolist(), items.counts_R.tolist(), items.first_tokens_R.tolist(), strict=True
    ):
        tokens = slice(token, token + count)
        positions_T = torch.arange(start, start + count, device=q_TNW.device)
        tables_TB = table_B.expand(count, -1)
        out_TNL[tokens] = mla_reference(q_TNW[tokens], cache_BSW, positions_T, tables_TB, options)


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``mla_prefill`` launches."""
    for variant in mla_variants():
        for in_spans in (False, True):
            # Whatever the heads, tiles are full unless their bits are to be those of decoding.
            most = mla_rows(1 << 16, variant.dtype, deterministic=in_spans, is_amd="gfx942" in variant.targets)
            if variant.rows > most or (variant.rows < most and not in_spans):
                continue
            integers = ("tables_ptr", "starts_ptr", "counts_ptr", "first_tokens_ptr")
            yield CompileCase(
                kernel=_mla_prefill_kernel,
                name=f"{variant.name}{' in spans' if in_spans else ''}",
                config=variant.config,
                signature={
                    "q_ptr": pointer(variant.dtype),
                    "cache_ptr": pointer(variant.cache_dtype),
                    **dict.fromkeys((*integers, "tiles_ptr", "tile_count_ptr"), "*i32"),
                    "out_ptr": pointer(variant.dtype),
                    **dict.fromkeys(("heads", "tile_queries", "table_stride", "block_size"), "i32"),
                    **dict.fromkeys(("scale", "cache_scale"), "fp32"),
                },
                constants={"IN_SPANS": in_spans, "SPAN": SPAN_KEYS, "LATENT": 512, "ROPE": 64},
                targets=variant.targets,
                spill_bytes=variant.spill_bytes,
            )
