"""What attention kernels walk: which row attends to which keys, built on the host from block tables once a step.

All arrays of a step's items are one piece of memory, sent to the device in one copy. With a ``capacity`` their shapes
depend on it and on the number of rows alone, so that a captured graph's items are renewed by copying ``flat``.

Shapes: R rows, B most blocks of a row, C items, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .attention_span import NO_WINDOW, SPAN_KEYS

Int32Array = NDArray[np.int32]

# Kernels see that what they load begins at a multiple of 16 bytes.
_ALIGNED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeItems:
    """Rows of one token, and the spans of keys that they see, on the device.

    An item is one row's span; a row's partials stand one after the other, the first at ``first_items_R1``. Items may
    stand in any order, and some be left out for another kernel to compute.

    - ``partials``: room for results, at least the number of spans that all rows see.
    - ``flat``: all arrays, side by side.

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
    flat: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class HostDecodeItems:
    """As ``DecodeItems``, on the host."""

    tables_RB: Int32Array
    positions_R: Int32Array
    tokens_R: Int32Array
    items_2C: Int32Array
    item_count_1: Int32Array
    first_items_R1: Int32Array
    partials: int

    def to(self, device: torch.device) -> DecodeItems:
        """Send the items to a device, in one copy."""
        flat, arrays = upload(
            (
                self.tables_RB,
                self.positions_R,
                self.tokens_R,
                self.items_2C,
                self.item_count_1,
                self.first_items_R1,
            ),
            device,
        )
        tables_RB, positions_R, tokens_R, items_2C, item_count_1, first_items_R1 = arrays
        return DecodeItems(
            tables_RB=tables_RB,
            positions_R=positions_R,
            tokens_R=tokens_R,
            items_2C=items_2C,
            item_count_1=item_count_1,
            first_items_R1=first_items_R1,
            partials=self.partials,
            flat=flat,
        )


def host_decode_items(
    positions: NDArray[np.integer],
    tokens: NDArray[np.integer],
    block_tables: Int32Array,
    *,
    window: int | None,
    capacity: int | None = None,
) -> HostDecodeItems:
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
    return HostDecodeItems(
        tables_RB=np.ascontiguousarray(block_tables, np.int32),
        positions_R=positions_R.astype(np.int32),
        tokens_R=np.asarray(tokens, np.int32),
        items_2C=items_2C,
        item_count_1=np.array([count], np.int32),
        first_items_R1=first_items_R1,
        partials=room,
    )


def decode_items(
    positions: NDArray[np.integer],
    tokens: NDArray[np.integer],
    block_tables: Int32Array,
    *,
    window: int | None,
    device: torch.device,
    capacity: int | None = None,
) -> DecodeItems:
    """As ``host_decode_items``, sent to a device."""
    return host_decode_items(positions, tokens, block_tables, window=window, capacity=capacity).to(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillItems:
    """Rows of several tokens, cut into tiles of queries, on the device.

    - ``tile_rows``: queries times query heads in a tile; ``queries``: queries of a tile.
    - ``flat``: all arrays, side by side.

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
    queries: int
    flat: Tensor


def prefill_items(
    starts: NDArray[np.integer],
    counts: NDArray[np.integer],
    first_tokens: NDArray[np.integer],
    block_tables: Int32Array,
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
    flat, arrays = upload(
        (
            np.ascontiguousarray(block_tables, np.int32),
            np.asarray(starts, np.int32),
            counts_R.astype(np.int32),
            np.asarray(first_tokens, np.int32),
            tiles_2C,
            np.array([count], np.int32),
        ),
        device,
    )
    tables_RB, starts_R, counts_device_R, first_tokens_R, tiles_device_2C, tile_count_1 = arrays
    return PrefillItems(
        tables_RB=tables_RB,
        starts_R=starts_R,
        counts_R=counts_device_R,
        first_tokens_R=first_tokens_R,
        tiles_2C=tiles_device_2C,
        tile_count_1=tile_count_1,
        tile_rows=tile_rows,
        queries=queries,
        flat=flat,
    )


def upload(arrays: Sequence[Int32Array], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Send int32 arrays to a device in one copy that nobody waits for; return (all of it, each array)."""
    ends = np.cumsum([-(-array.size // _ALIGNED) * _ALIGNED for array in arrays])
    total = int(ends[-1])
    host = torch.zeros(total, dtype=torch.int32, pin_memory=device.type == "cuda")
    for array, end in zip(arrays, ends.tolist(), strict=True):
        first = end - -(-array.size // _ALIGNED) * _ALIGNED
        host.numpy()[first : first + array.size] = array.ravel()
    flat = host.to(device, non_blocking=True)
    parts = []
    for array, end in zip(arrays, ends.tolist(), strict=True):
        first = end - -(-array.size // _ALIGNED) * _ALIGNED
        parts.append(flat[first : first + array.size].view(array.shape))
    return flat, parts
