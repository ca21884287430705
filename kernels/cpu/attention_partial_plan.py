"""Where some queries of a row find those of their keys that are there, when keys come in several turns.

Owns the choice of columns: runs of keys side by side, each in whole blocks of the cache, with what does not belong to
a run hidden. Nothing else is read: other blocks of the row may not have been written yet.

Shapes: K KV heads, B blocks, Q queries of a tile, L columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .attention_keys import ABSENT, Int32Array, Int64Array, KeyLayout
from .attention_prefill_plan import PrefillGroup, PrefillTile, padded_queries, tile_bounds


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Positions ``start`` to ``end``; of queries, they begin at ``token`` of the batch."""

    start: int
    end: int
    token: int = 0


def build_partial_plan(
    queries: Sequence[Run], keys: Sequence[Run], block_table: Int32Array, layout: KeyLayout
) -> PrefillGroup | None:
    """Build the plan by which a row's ``queries`` attend to its ``keys``, causally; None where they see none.

    Runs of keys are best in the order of their positions, and must not overlap.

    Shapes: block_table [blocks of the row]
    """
    columns = _columns(queries, keys, layout)
    if columns is None:
        return None
    indices_B, positions_L = columns
    tiles = [
        tile
        for run in queries
        for first, end in tile_bounds(run.start, run.end - run.start)
        if (tile := _tile(first, end, run.token + first - run.start, positions_L, layout)) is not None
    ]
    if not tiles:
        return None
    blocks_B = block_table[indices_B].astype(np.int64)
    rows_KB = blocks_B * layout.kv_heads + np.arange(layout.kv_heads)[:, None]
    return PrefillGroup(gather_RKB=torch.from_numpy(rows_KB[None]).to(layout.device), tiles=tuple(tiles))


def _columns(queries: Sequence[Run], keys: Sequence[Run], layout: KeyLayout) -> tuple[Int64Array, Int64Array] | None:
    """Return the blocks' places in the table and the columns' positions, filled up to whole units."""
    size = layout.block_size
    last = max(run.end for run in queries)
    (lowest,) = layout.lowest_seen(np.array([min(run.start for run in queries)])).tolist()
    indices: list[Int64Array] = []
    positions: list[Int64Array] = []
    for run in keys:
        start, end = max(run.start, lowest), min(run.end, last)
        if start < end:
            blocks = np.arange(start // size, -(-end // size))
            columns = (blocks[:, None] * size + np.arange(size)).reshape(-1)
            indices.append(blocks)
            positions.append(np.where((columns >= start) & (columns < end), columns, ABSENT))
    if not indices:
        return None
    count = sum(map(len, indices))
    missing = -count % (layout.unit_keys // size)
    # What fills up must not be read from a block that may hold anything.
    return (
        np.concatenate((*indices, np.repeat(indices[0][:1], missing))),
        np.concatenate((*positions, np.full(missing * size, ABSENT))),
    )


def _tile(first: int, end: int, token: int, positions_L: Int64Array, layout: KeyLayout) -> PrefillTile | None:
    """Return the tile of the queries at ``first`` to ``end``, which begin at ``token`` of the batch."""
    unit = layout.unit_keys
    lowest_of_first, lowest_of_last = layout.lowest_seen(np.array([first, end - 1])).tolist()
    seen = np.flatnonzero((positions_L < end) & (positions_L >= lowest_of_first))
    if not len(seen):
        return None
    begin, stop = int(seen[0]) // unit * unit, -(-(int(seen[-1]) + 1) // unit) * unit
    by_all = (positions_L[begin:stop] <= first) & (positions_L[begin:stop] >= lowest_of_last)
    edge = stop if by_all.all() else begin + int(by_all.argmin())
    queries = padded_queries(end - first)
    query_positions_1Q = np.minimum(first + np.arange(queries), end - 1)[None]
    return PrefillTile(
        tokens_RQ=torch.from_numpy(query_positions_1Q[0] + (token - first)).to(layout.device),
        place=slice(token, token + end - first),
        queries=queries,
        ranges=((begin, stop),),
        edge=edge,
        mask_R11QW=layout.mask_at(query_positions_1Q, positions_L[None, edge:stop])[:, None, None],
    )
