"""Decoding with multi-head latent attention: spans of keys side by side, merged afterwards.

Spans and their merge are those of ordinary attention (``attention_span``, ``attention_merge``); to these, a model with
latent attention has one KV head of the latent's size.

Shapes: as in ``mla_span``; C items, each a span of keys of a row.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .attention_items import DecodeItems
from .attention_merge import merge_partials
from .attention_span import SPAN_KEYS, AttentionOptions, empty_partials
from .backends import uses_triton
from .compile_case import CompileCase, pointer
from .launch import jit, launch, processors, tl
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


@jit
def _mla_decode_kernel(
    q_ptr,
    cache_ptr,
    tables_ptr,
    positions_ptr,
    tokens_ptr,
    items_ptr,
    item_count_ptr,
    first_items_ptr,
    results_ptr,
    peaks_ptr,
    totals_ptr,
    heads,
    capacity,
    table_stride,
    block_size,
    scale,
    SPAN: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program computes the partial attention of some heads to one span of one row, item after item."""
    count = tl.load(item_count_ptr)
    head_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_head_M = head_M < heads
    for item in range(tl.program_id(0), count, tl.num_programs(0)):
        row = tl.load(items_ptr + item)
        span = tl.load(items_ptr + capacity + item)
        # A row sees all spans from its first on.
        place = (tl.load(first_items_ptr + row) + span).to(tl.int64)
        position = tl.load(positions_ptr + row)
        token = tl.load(tokens_ptr + row).to(tl.int64)
        q_latent_ML, q_rope_MR = load_mla_queries(
            q_ptr + token * heads * (LATENT + ROPE), head_M, is_head_M, LATENT, ROPE
        )
        result_ML, peak_M, total_M = attend_latents(
            q_latent_ML,
            q_rope_MR,
            tl.zeros([BLOCK_M], tl.int32) + position,
            cache_ptr,
            tables_ptr + row.to(tl.int64) * table_stride,
            span * SPAN,
            tl.minimum(position + 1, span * SPAN + SPAN),
            block_size,
            scale,
            LATENT,
            ROPE,
            BLOCK_M,
            BLOCK_N,
        )
        result_ptrs = results_ptr + place * heads * LATENT + (head_M[:, None] * LATENT + tl.arange(0, LATENT)[None, :])
        tl.store(result_ptrs, result_ML, mask=is_head_M[:, None])
        tl.store(peaks_ptr + place * heads + head_M, peak_M, mask=is_head_M)
        tl.store(totals_ptr + place * heads + head_M, total_M, mask=is_head_M)


def mla_decode(q_TNW: Tensor, cache_BSW: Tensor, items: DecodeItems, options: MlaOptions, out_TNL: Tensor) -> None:
    """Write the attention of the items' rows to ``out``, as ``mla_reference`` has it.

    Shapes: q_TNW [tokens, heads, latent + rotated]; cache_BSW [blocks, block size, latent + rotated] contiguous, of
    q's type or float8_e4m3fn; out_TNL [tokens, heads, latent] contiguous; other tokens of it are left alone
    Raises: ValueError
    """
    check_mla(q_TNW, cache_BSW, options, out_TNL)
    heads, width = q_TNW.shape[1:]
    if not uses_triton("mla", q_TNW):
        tokens_R = items.tokens_R.long()
        out_TNL[tokens_R] = mla_reference(q_TNW[tokens_R], cache_BSW, items.positions_R, items.tables_RB, options)
        return
    rows = mla_rows(heads, q_TNW.dtype, deterministic=options.deterministic)
    head_tiles = -(-heads // rows)
    capacity = items.items_2C.shape[1]
    partials = empty_partials(items.partials, heads, options.latent, q_TNW.device)
    launch(
        _mla_decode_kernel,
        # One program fills a processor, or two do.
        (min(capacity, max(1, 2 * processors(q_TNW.device) // head_tiles)), head_tiles),
        mla_config(rows, q_TNW.dtype),
        q_ptr=q_TNW.contiguous(),
        cache_ptr=cache_BSW,
        tables_ptr=items.tables_RB,
        positions_ptr=items.positions_R,
        tokens_ptr=items.tokens_R,
        items_ptr=items.items_2C,
        item_count_ptr=items.item_count_1,
        first_items_ptr=items.first_items_R1,
        results_ptr=partials.results_CND,
        peaks_ptr=partials.peaks_CN,
        totals_ptr=partials.totals_CN,
        heads=heads,
        capacity=capacity,
        table_stride=items.tables_RB.stride(0),
        block_size=cache_BSW.shape[1],
        scale=options.scale * options.cache_scale,
        SPAN=SPAN_KEYS,
        LATENT=options.latent,
        ROPE=width - options.latent,
    )
    merge_options = AttentionOptions(scale=options.scale, v_scale=options.cache_scale)
    merge_partials(partials, items.first_items_R1, items.tokens_R, merge_options, out_TNL)


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``mla_decode`` launches."""
    for variant in mla_variants():
        yield CompileCase(
            kernel=_mla_decode_kernel,
            name=variant.name,
            config=variant.config,
            signature={
                "q_ptr": pointer(variant.dtype),
                "cache_ptr": pointer(variant.cache_dtype),
                **dict.fromkeys(("tables_ptr", "positions_ptr", "tokens_ptr"), "*i32"),
                **dict.fromkeys(("items_ptr", "item_count_ptr", "first_items_ptr"), "*i32"),
                **dict.fromkeys(("results_ptr", "peaks_ptr", "totals_ptr"), "*fp32"),
                **dict.fromkeys(("heads", "capacity", "table_stride", "block_size"), "i32"),
                "scale": "fp32",
            },
            constants={"SPAN": SPAN_KEYS, "LATENT": 512, "ROPE": 64},
            targets=variant.targets,
            spill_bytes=variant.spill_bytes,
        )
