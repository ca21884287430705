"""Where rows of several tokens find their keys: tiles of queries, rows with equal tiles side by side.

Tiles begin at fixed positions (multiples of ``QUERY_TILE``), so that a tile's place does not depend on the chunk.
A tile sees one range of keys, or, in deterministic mode, the spans that its queries see, to be merged.

Shapes: R rows of a group, K KV heads, B blocks, Q queries of a tile, W masked keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .attention_keys import Int32Array, Int64Array, KeyLayout, own_blocks

QUERY_TILE = 128
SMALLEST_TILE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillTile:
    """One tile of each row of a group. Queries beyond a row's own repeat its last one, results included.

    ``ranges`` are the columns of the gathered keys that are attended to, more than one if they are to be merged;
    columns below ``edge`` are seen by every query and have no mask.

    ``place`` is where the tile stands in the batch if the group has one row: a copy of a slice is cheaper.

    Shapes: tokens_RQ [rows * queries] int64, places in the batch; mask_R11QW [rows, 1, 1, queries, columns from
    ``edge`` on] of the plan's type
    """

    tokens_RQ: Tensor
    place: slice | None
    queries: int
    ranges: tuple[tuple[int, int], ...]
    edge: int
    mask_R11QW: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillGroup:
    """Rows whose tiles have the same shapes.

    Shapes: gather_RKB [rows, KV heads, blocks] int64, see ``KeyLayout.gather``
    """

    gather_RKB: Tensor
    tiles: tuple[PrefillTile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _TileShape:
    """A tile's sizes, as in ``PrefillTile``."""

    queries: int
    ranges: tuple[tuple[int, int], ...]
    edge: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _RowShape:
    """What rows must have in common to be computed side by side."""

    columns: int
    tiles: tuple[_TileShape, ...]


def build_prefill_plan(
    *,
    starts: Int64Array,
    counts: Int64Array,
    first_tokens: Int64Array,
    block_tables: Int32Array,
    layout: KeyLayout,
    deterministic: bool,
) -> tuple[PrefillGroup, ...]:
    """Build the plan of rows that begin at ``starts`` and at ``first_tokens`` in the batch.

    Shapes: starts, counts, first_tokens [rows] int64; block_tables [rows, most blocks]
    """
    grain = layout.span_keys if deterministic else layout.unit_keys
    first_keys = layout.lowest_seen(starts) // grain * grain
    members: dict[_RowShape, list[int]] = {}
    for row, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
        shape = _row_shape(start, count, int(first_keys[row]), layout, deterministic)
        members.setdefault(shape, []).append(row)
    groups = []
    for shape, rows in members.items():
        chosen = np.array(rows)
        groups.append(
            _group(
                shape,
                starts=starts[chosen],
                counts=counts[chosen],
                first_tokens=first_tokens[chosen],
                first_keys=first_keys[chosen],
                block_tables=block_tables[chosen],
                layout=layout,
            )
        )
    return tuple(groups)


def tile_bounds(start: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield the positions (first, end) of a row's tiles."""
    first, end = start, start + count
    while first < end:
        last = min(end, (first // QUERY_TILE + 1) * QUERY_TILE)
        yield first, last
        first = last


def padded_queries(queries: int) -> int:
    """Return the queries that a tile of so many is filled up to."""
    return max(SMALLEST_TILE, 1 << (queries - 1).bit_length())


def _row_shape(start: int, count: int, first_key: int, layout: KeyLayout, deterministic: bool) -> _RowShape:
    unit, span = layout.unit_keys, layout.span_keys
    tiles = []
    for first, end in tile_bounds(start, count):
        begin = 0
        edge = (first - first_key) // unit * unit
        if layout.window is not None:
            grain = span if deterministic else unit
            begin = max(0, first - (layout.window - 1) - first_key) // grain * grain
            # The window hides old keys from some query, unless even the last one sees the first column.
            edge = edge if end - layout.window <= first_key + begin else begin
        ranges = _ranges(begin, end - first_key, layout, deterministic)
        queries = padded_queries(end - first)
        tiles.append(_TileShape(queries=queries, ranges=ranges, edge=max(edge, begin)))
    return _RowShape(columns=max(tile.ranges[-1][1] for tile in tiles), tiles=tuple(tiles))


def _ranges(begin: int, end: int, layout: KeyLayout, deterministic: bool) -> tuple[tuple[int, int], ...]:
    """Return the ranges of columns to attend to, from ``begin`` to ``end`` and what pads them."""
    unit, span = layout.unit_keys, layout.span_keys
    if end - begin > span and not deterministic:
        return ((begin, -(-end // unit) * unit),)
    firsts = range(begin, end, span)
    lengths = layout.padded(np.array([min(end - first, span) for first in firsts]))
    return tuple((first, first + length) for first, length in zip(firsts, lengths.tolist(), strict=True))


def _group(
    shape: _RowShape,
    *,
    starts: Int64Array,
    counts: Int64Array,
    first_tokens: Int64Array,
    first_keys: Int64Array,
    block_tables: Int32Array,
    layout: KeyLayout,
) -> PrefillGroup:
    block_size, rows = layout.block_size, np.arange(len(starts))
    blocks = shape.columns // block_size
    ends = starts + counts
    first_blocks, last_blocks = first_keys // block_size, (ends - 1) // block_size
    lowest_blocks = layout.lowest_seen(starts) // block_size
    tables = own_blocks(block_tables, lowest_blocks, last_blocks, int(first_blocks.max()) + blocks)
    firsts = starts
    tiles = []
    for tile in shape.tiles:
        tile_ends = np.minimum(ends, (firsts // QUERY_TILE + 1) * QUERY_TILE)
        positions = np.minimum(firsts[:, None] + np.arange(tile.queries), tile_ends[:, None] - 1)
        tokens = positions + (first_tokens - starts)[:, None]
        mask_RQW = layout.mask(positions, first_keys + tile.edge, tile.ranges[-1][1] - tile.edge)
        tiles.append(
            PrefillTile(
                tokens_RQ=torch.from_numpy(tokens.reshape(-1)).to(layout.device),
                place=slice(int(tokens[0, 0]), int(tokens[0, -1]) + 1) if len(rows) == 1 else None,
                queries=tile.queries,
                ranges=tile.ranges,
                edge=tile.edge,
                mask_R11QW=mask_RQW[:, None, None],
            )
        )
        firsts = tile_ends
    return PrefillGroup(
        gather_RKB=layout.gather(tables, rows, first_blocks, blocks),
        tiles=tuple(tiles),
    )
