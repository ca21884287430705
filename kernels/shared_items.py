"""Which spans of keys several decoding rows have in common: found from their block tables, on the host, once a step.

Rows share a span if all of them see all of it and it lies in the same blocks for each. Nothing else is asked: rows
that go apart later share what is before, each pair as much as it has in common, so that trees of prefixes need no
tree. What is shared leaves the rows' own items; partials keep their places, and are merged as ever.

Shapes: R rows, C items, S members (rows of shared spans, span by span), B most blocks of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .attention_items import DecodeItems
from .attention_span import NO_WINDOW, SPAN_KEYS

LEAST_ROWS = 4
"""Fewer rows are left alone: the second one to read a span finds it in a cache of the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedItems:
    """Decoding rows with the spans that several of them have in common apart from those of their own.

    - ``own``: all rows, and the items that each computes by itself.
    - ``tile_rows``: queries times query heads in a tile.

    Shapes: members_S [members] rows; tiles_4C [4, tiles]: a row whose table has the span, the span, the first member
    of the tile, its members; tile_count_1 [1]; all int32
    """

    own: DecodeItems
    members_S: Tensor
    tiles_4C: Tensor
    tile_count_1: Tensor
    tile_rows: int


def share_items(
    items: DecodeItems,
    *,
    window: int | None,
    block_size: int,
    heads_per_kv: int,
    tile_rows: int,
    least_rows: int = LEAST_ROWS,
) -> SharedItems:
    """Take spans that at least ``least_rows`` rows share out of the rows' items; everything is on the host.

    Shapes depend on the items' own alone, so that a captured graph can be given others. ``window`` is that of the
    items, ``tile_rows`` that of ``shared_prefix.shared_tile_rows``.
    """
    count, room = int(items.item_count_1), items.items_2C.shape[1]
    rows_C, spans_C = items.items_2C.numpy()[:, :count]
    group_C = _groups(rows_C, spans_C, items, window or NO_WINDOW, block_size, least_rows)
    shared = np.flatnonzero(group_C >= 0)
    shared = shared[np.argsort(group_C[shared], kind="stable")]
    members_S = np.zeros(room, np.int32)
    members_S[: len(shared)] = rows_C[shared]
    # A tile: as many members as it has room for, of one span.
    _, first_members, members = np.unique(group_C[shared], return_index=True, return_counts=True)
    most = tile_rows // min(heads_per_kv, tile_rows)
    tiles = -(-members // most)
    firsts = (np.arange(tiles.sum()) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * most
    places = np.repeat(first_members, tiles) + firsts
    tiles_4C = np.zeros((4, room), np.int32)
    tiles_4C[:, : len(places)] = (
        members_S[places],
        spans_C[shared][places],
        places,
        np.minimum(np.repeat(members, tiles) - firsts, most),
    )
    own = np.flatnonzero(group_C < 0)
    own_2C = np.zeros((2, room), np.int32)
    own_2C[:, : len(own)] = rows_C[own], spans_C[own]
    return SharedItems(
        own=replace(
            items,
            items_2C=torch.from_numpy(own_2C),
            item_count_1=torch.tensor([len(own)], dtype=torch.int32),
        ),
        members_S=torch.from_numpy(members_S),
        tiles_4C=torch.from_numpy(tiles_4C),
        tile_count_1=torch.tensor([len(places)], dtype=torch.int32),
        tile_rows=tile_rows,
    )


def _groups(
    rows_C: NDArray[np.int32],
    spans_C: NDArray[np.int32],
    items: DecodeItems,
    window: int,
    block_size: int,
    least_rows: int,
) -> NDArray[np.int64]:
    """Return by item which shared span it is one of, -1: none."""
    group_C = np.full(len(rows_C), -1, np.int64)
    span_blocks = SPAN_KEYS // block_size
    if span_blocks * block_size != SPAN_KEYS:
        return group_C
    ends_C = items.positions_R.numpy().astype(np.int64)[rows_C] + 1
    begins_C = spans_C.astype(np.int64) * SPAN_KEYS
    whole = np.flatnonzero((begins_C + SPAN_KEYS <= ends_C) & (begins_C >= ends_C - window))
    if len(whole) < least_rows:
        return group_C
    tables_RB = items.tables_RB.numpy()
    rows, first_blocks = rows_C[whole], spans_C[whole].astype(np.int64) * span_blocks
    # Spans that begin and end with the same blocks are most likely the same ones: what is not is sorted out below.
    begin_blocks, end_blocks = tables_RB[rows, first_blocks], tables_RB[rows, first_blocks + span_blocks - 1]
    keys = (first_blocks << 52) ^ (begin_blocks.astype(np.int64) << 26) ^ end_blocks
    _, leaders, groups, sizes = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    some = np.flatnonzero(sizes[groups] >= least_rows)
    leader = leaders[groups[some]]
    columns = np.arange(span_blocks)
    blocks = tables_RB[rows[some, None], first_blocks[some, None] + columns]
    is_same = (blocks == tables_RB[rows[leader, None], first_blocks[leader, None] + columns]).all(1)
    is_same &= first_blocks[some] == first_blocks[leader]
    some = some[is_same]
    some = some[np.bincount(groups[some], minlength=len(sizes))[groups[some]] >= least_rows]
    group_C[whole[some]] = groups[some]
    return group_C
