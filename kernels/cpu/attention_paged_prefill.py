"""Prefill attention by the compiled kernel, which reads keys and values where they are in the cache.

A row (a run of positions of one sequence) is cut into tiles of queries, which any thread may take; a tile goes over the
spans of keys that it sees, at fixed positions, in their order. A position's bits depend on its own keys alone: they are
those of decoding (``attention_paged``), wherever rows and tiles begin.

Shapes: R rows, C items (tiles), B blocks, K KV heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..attention_span import AttentionOptions
from .attention_keys import Int32Array, Int64Array, KeyLayout
from .attention_paged import check_blocks, set_layer
from .native import Native, PrefillJob, native

_TILE_ROWS = 96
"""Query heads in a tile: enough to make up for laying its keys side by side, few enough to stay in the cache."""
_EVERY_KEY = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedRuns:
    """The rows of several tokens of a step. ``window``: how many keys a position sees at most.

    Shapes: starts_R, counts_R, tokens_R, lowest_seen_R [rows] int64; tables_RB int32, contiguous
    """

    starts_R: Int64Array
    counts_R: Int64Array
    tokens_R: Int64Array
    lowest_seen_R: Int64Array
    tables_RB: Int32Array
    window: int
    compiled: Native


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRuns:
    """The rows, ready for any layer of the same shape. ``memory``: what the job points to.

    Shapes: items [2, items] int32, see ``struct prefill_job``
    """

    job: PrefillJob
    memory: tuple[PagedRuns, Int32Array, Tensor]


def build_paged_runs(
    *, starts: Int64Array, counts: Int64Array, first_tokens: Int64Array, block_tables: Int32Array, layout: KeyLayout
) -> PagedRuns | None:
    """Return the rows that begin at ``starts`` and at ``first_tokens`` in the batch; None if the compiled kernel does
    not serve their type.

    Shapes: starts, counts, first_tokens [rows] int64; block_tables [rows, most blocks]
    """
    serves = layout.device.type == "cpu" and layout.dtype in (torch.bfloat16, torch.float32)
    compiled = native() if serves else None
    if compiled is None:
        return None
    return PagedRuns(
        starts_R=np.ascontiguousarray(starts),
        counts_R=np.ascontiguousarray(counts),
        tokens_R=np.ascontiguousarray(first_tokens),
        lowest_seen_R=layout.lowest_seen(starts),
        tables_RB=np.ascontiguousarray(block_tables, np.int32),
        window=_EVERY_KEY if layout.window is None else layout.window,
        compiled=compiled,
    )


def prepare_paged_runs(runs: PagedRuns, layer_cache: Tensor, *, heads: int) -> PreparedRuns:
    """Make what the layers of a step have in common, for ``heads`` query heads. ``layer_cache``: any layer's.

    Raises: IndexError for a block that the cache does not have
    """
    parts, num_blocks, kv_heads, block_size, head_size = layer_cache.shape
    lasts_R = runs.starts_R + runs.counts_R - 1
    check_blocks(runs.tables_RB, runs.lowest_seen_R, lasts_R, num_blocks=num_blocks, block_size=block_size)
    group, threads = heads // kv_heads, torch.get_num_threads()
    tile_queries = max(1, _TILE_ROWS // group)
    items = _tiles(runs, tile_queries)
    job = PrefillJob(
        tables=runs.tables_RB.ctypes.data,
        item_rows=items[0].ctypes.data,
        item_firsts=items[1].ctypes.data,
        starts=runs.starts_R.ctypes.data,
        counts=runs.counts_R.ctypes.data,
        tokens=runs.tokens_R.ctypes.data,
        table_columns=runs.tables_RB.shape[1],
        # What stands between keys and values.
        num_blocks=(parts - 1) * num_blocks,
        kv_heads=kv_heads,
        group=group,
        block_size=block_size,
        head_size=head_size,
        items=items.shape[1],
        tile_queries=tile_queries,
        window=runs.window,
        bf16=layer_cache.dtype == torch.bfloat16,
        threads=threads,
    )
    job.scratch_bytes = runs.compiled.prefill_scratch(job)
    scratch = torch.empty(threads * job.scratch_bytes, dtype=torch.uint8)
    job.scratch = scratch.data_ptr()
    return PreparedRuns(job=job, memory=(runs, items, scratch))


def _tiles(runs: PagedRuns, tile_queries: int) -> Int32Array:
    """Return each tile's row and the place of its first query in it, those that see most keys first: what is begun
    last should not take long.

    Shapes: returns [2, items] int32
    """
    tiles_R = -(-runs.counts_R // tile_queries)
    rows_C = np.repeat(np.arange(len(tiles_R)), tiles_R)
    firsts_C = (np.arange(len(rows_C)) - np.repeat(np.cumsum(tiles_R) - tiles_R, tiles_R)) * tile_queries
    order_C = np.argsort(-(runs.starts_R[rows_C] + firsts_C), kind="stable")
    return np.stack((rows_C[order_C], firsts_C[order_C])).astype(np.int32)


def attend_paged_runs(
    q_TND: Tensor, layer_cache: Tensor, prepared: PreparedRuns, options: AttentionOptions, *, out_TND: Tensor
) -> None:
    """Compute the attention of the prepared rows into their places in ``out_TND``.

    Shapes: q_TND [tokens, heads, head size], heads side by side; out_TND like it, contiguous; layer_cache [2, blocks,
    KV heads, block size, head size] contiguous; all of one type
    """
    set_layer(prepared.job, q_TND, layer_cache, options, out_TND=out_TND)
    prepared.memory[0].compiled.attend_prefill(prepared.job)
