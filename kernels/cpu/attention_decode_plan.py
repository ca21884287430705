"""Where rows of one token find their keys: items of one row and one span each, grouped by padded length.

A row that sees one span is an item by itself (``direct``). A row that sees several has an item for each, whose
results are merged (``split``).

Shapes: R rows, S spans of a row, C items, K KV heads, B blocks, L keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .attention_keys import Int32Array, Int64Array, KeyLayout, own_blocks

# Items are padded to the next longer group's length as long as that adds fewer keys: reading them takes less than
# the operations of one more launch.
WASTE_KEYS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanGroup:
    """Items of equal padded length, ``keys``. ``in_order``: they are the first tokens of the batch, in order.

    Shapes: tokens_C [items] int64, places in the batch; gather_CKB [items, KV heads, blocks] int64, see
    ``KeyLayout.gather``; mask_C11L [items, 1, 1, keys] of the plan's type, None if every item sees every key
    """

    keys: int
    in_order: bool
    tokens_C: Tensor
    gather_CKB: Tensor
    mask_C11L: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRows:
    """Rows that see several spans.

    Shapes: tokens_R [rows] int64; items_RS [rows, most spans] int64, each row's items, counted through all
    groups, then any of its own; absent_RS1 [rows, most spans, 1] float32, 0 for an item, -inf beyond
    """

    groups: tuple[SpanGroup, ...]
    tokens_R: Tensor
    items_RS: Tensor
    absent_RS1: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """The rows of one token."""

    direct: tuple[SpanGroup, ...]
    split: SplitRows | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Items:
    """Shapes: rows, first_keys, lengths [items]; tables [rows, blocks]; positions, tokens [rows]"""

    rows: Int64Array
    first_keys: Int64Array
    lengths: Int64Array
    tables: Int32Array
    positions: Int64Array
    tokens: Int64Array
    layout: KeyLayout


def build_decode_plan(
    positions: Int64Array, tokens: Int64Array, block_tables: Int32Array, layout: KeyLayout
) -> DecodePlan:
    """Build the plan of rows at ``positions``, which stand at ``tokens`` in the batch.

    Shapes: positions, tokens [rows] int64; block_tables [rows, most blocks]
    """
    span, block_size = layout.span_keys, layout.block_size
    first_spans, last_spans = layout.lowest_seen(positions) // span, positions // span
    spans = last_spans - first_spans + 1
    rows = np.repeat(np.arange(len(positions)), spans)
    ordinals = np.arange(len(rows)) - np.repeat(np.cumsum(spans) - spans, spans)
    first_keys = (first_spans[rows] + ordinals) * span
    reach = int(last_spans.max() + 1) * span // block_size
    items = _Items(
        rows=rows,
        first_keys=first_keys,
        lengths=np.minimum(positions[rows] + 1 - first_keys, span),
        tables=own_blocks(block_tables, layout.lowest_seen(positions) // block_size, positions // block_size, reach),
        positions=positions,
        tokens=tokens,
        layout=layout,
    )
    is_split = spans[rows] > 1
    direct = tuple(_span_group(items, chosen, keys) for chosen, keys in _groups(items, np.flatnonzero(~is_split)))
    split = _split_rows(items, spans, np.flatnonzero(is_split)) if is_split.any() else None
    return DecodePlan(direct=direct, split=split)


def _groups(items: _Items, chosen: NDArray[np.intp]) -> list[tuple[NDArray[np.intp], int]]:
    """Return (items, padded keys) of each launch, longest first."""
    padded = items.layout.padded(items.lengths[chosen])
    groups: list[tuple[NDArray[np.intp], int]] = []
    waste = 0
    for keys in np.unique(padded)[::-1].tolist():
        same = chosen[padded == keys]
        waste += len(same) * (groups[-1][1] - keys) if groups else 0
        if groups and waste <= WASTE_KEYS:
            groups[-1] = (np.concatenate((groups[-1][0], same)), groups[-1][1])
        else:
            groups.append((same, keys))
            waste = 0
    return groups


def _span_group(items: _Items, chosen: NDArray[np.intp], keys: int) -> SpanGroup:
    layout = items.layout
    rows, first_keys = items.rows[chosen], items.first_keys[chosen]
    first_blocks = first_keys // layout.block_size
    tokens, positions = items.tokens[rows], items.positions[rows]
    mask_C11L = None
    if not layout.sees_all(positions, first_keys, keys):
        mask_C11L = layout.mask(positions[:, None], first_keys, keys).unsqueeze(1)
    return SpanGroup(
        keys=keys,
        in_order=bool((tokens == np.arange(len(tokens))).all()),
        tokens_C=torch.from_numpy(tokens).to(layout.device),
        gather_CKB=layout.gather(items.tables, rows, first_blocks, keys // layout.block_size),
        mask_C11L=mask_C11L,
    )


def _split_rows(items: _Items, spans: Int64Array, chosen: NDArray[np.intp]) -> SplitRows:
    groups = _groups(items, chosen)
    places = np.empty(len(items.rows), np.int64)
    places[np.concatenate([members for members, _ in groups])] = np.arange(len(chosen))
    split_rows = np.flatnonzero(spans > 1)
    first_items = (np.cumsum(spans) - spans)[split_rows]
    ordinals = np.arange(int(spans.max()))
    present = ordinals < spans[split_rows, None]
    items_RS = places[first_items[:, None] + np.where(present, ordinals, 0)]
    device = items.layout.device
    return SplitRows(
        groups=tuple(_span_group(items, members, keys) for members, keys in groups),
        tokens_R=torch.from_numpy(items.tokens[split_rows]).to(device),
        items_RS=torch.from_numpy(items_RS).to(device),
        absent_RS1=torch.from_numpy(np.where(present, np.float32(0), np.float32(-np.inf))[..., None]).to(device),
    )
