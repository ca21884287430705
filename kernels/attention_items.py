"""What attention kernels walk: which row attends to which keys, built on the host from block tables once a step.

With a ``capacity`` the shapes of items depend on it, on the number of rows and on the tables' width alone, so that a
captured graph's items can be renewed by copying others over them.

Shapes: R rows, B most blocks of a row, C items, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .attention_span import NO_WINDOW, SPAN_KEYS


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeItems:
    """Rows of one token, and the spans of keys that they see.

    An item is one row's span; a row's partials stand one after the other, the first at ``first_items_R1``. Items may
    stand in any order, and some be left out for another kernel to compute.

    ``partials``: room for results, at least the number of spans that all rows see.

    Shapes: tables_RB [rows, most blocks], entries that no position of the row needs are never read; positions_R [rows],
    -1: the row has no keys, its result is zeros; tokens_R [rows], places in q; items_2C [2, capacity], rows and spans;
    item_count_1 [1], items that are there; first_items_R1 [rows + 1]; all int32
    """

    tables_RB: Tensor
    positions_R: Tensor
    tokens_R: Tensor
    items_2C: Tensor
    item_count_1: Tensor
    first_items_R1: Tensor
    partials: int


def decode_items(
    positions: NDArray[np.integer],
    tokens: NDArray[np.integer],
    block_tables: NDArray[np.integer],
    *,
    window: int | None,
    device: torch.device,
    capacity: int | None = None,
) -> DecodeItems:
    """Cut what rows of one token see into spans.

    Shapes: positions [rows], -1 for a row without keys; tokens [rows], places in the batch; block_tables [rows, most
    blocks]
    Raises: ValueError if there are more items than ``capacity``
    """
    positions_R = np.asarray(positions, np.int64)
    first_spans_R = np.maximum(positions_R - (window or NO_WINDOW) + 1, 0) // SPAN_KEYS
    spans_R = np.where(positions_R < 0, 0, positions_R // SPAN_KEYS - first_spans_R + 1)
    first_items_R1 = np.zeros(len(spans_R) + 1, np.int32)
    np.cumsum(spans_R, out=first_items_R1[1:])
    count = int(first_items_R1[-1])
    room = count if capacity is None else capacity
    if count > room:
        raise ValueError(f"{count} spans of {len(positions_R)} rows are more than the capacity of {room}")
    items_2C = np.zeros((2, room), np.int32)
    items_2C[0, :count] = np.repeat(np.arange(len(spans_R)), spans_R)
    items_2C[1, :count] = np.arange(count) + np.repeat(first_spans_R - first_items_R1[:-1], spans_R)
    return DecodeItems(
        tables_RB=_sent(block_tables, device),
        positions_R=_sent(positions_R, device),
        tokens_R=_sent(tokens, device),
        items_2C=_sent(items_2C, device),
        item_count_1=_sent(np.array([count]), device),
        first_items_R1=_sent(first_items_R1, device),
        partials=room,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillItems:
    """Rows of several tokens, cut into tiles of queries.

    ``tile_rows``: queries times query heads in a tile.

    Shapes: tables_RB as in ``DecodeItems``; starts_R [rows], a row's first position; counts_R [rows], its queries;
    first_tokens_R [rows], the place of the first in q; tiles_2C [2, capacity], rows and first queries, those with most
    keys first; tile_count_1 [1]; all int32
    """

    tables_RB: Tensor
    starts_R: Tensor
    counts_R: Tensor
    first_tokens_R: Tensor
    tiles_2C: Tensor
    tile_count_1: Tensor
    tile_rows: int


def prefill_items(
    starts: NDArray[np.integer],
    counts: NDArray[np.integer],
    first_tokens: NDArray[np.integer],
    block_tables: NDArray[np.integer],
    *,
    heads_per_kv: int,
    tile_rows: int,
    device: torch.device,
    capacity: int | None = None,
) -> PrefillItems:
    """Cut rows of several tokens into tiles of ``tile_rows`` (``attention_prefill.prefill_tile_rows``).

    Shapes: starts, counts, first_tokens [rows]; block_tables [rows, most blocks]
    Raises: ValueError if there are more tiles than ``capacity``
    """
    counts_R = np.asarray(counts, np.int64)
    queries = tile_rows // min(heads_per_kv, tile_rows)
    tiles_R = -(-counts_R // queries)
    count = int(tiles_R.sum())
    room = count if capacity is None else capacity
    if count > room:
        raise ValueError(f"{count} tiles of {len(counts_R)} rows are more than the capacity of {room}")
    rows = np.repeat(np.arange(len(counts_R)), tiles_R)
    first_queries = (np.arange(count) - np.repeat(np.cumsum(tiles_R) - tiles_R, tiles_R)) * queries
    # The longest begin first, so that none of them is still at work alone at the end.
    order = np.argsort(-(np.asarray(starts, np.int64)[rows] + first_queries), kind="stable")
    tiles_2C = np.zeros((2, room), np.int32)
    tiles_2C[0, :count], tiles_2C[1, :count] = rows[order], first_queries[order]
    return PrefillItems(
        tables_RB=_sent(block_tables, device),
        starts_R=_sent(starts, device),
        counts_R=_sent(counts_R, device),
        first_tokens_R=_sent(first_tokens, device),
        tiles_2C=_sent(tiles_2C, device),
        tile_count_1=_sent(np.array([count]), device),
        tile_rows=tile_rows,
    )


def _sent(numbers: NDArray[np.integer], device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(numbers, np.int32, order="C")).to(device)
