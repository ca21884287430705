"""What a divided step has in common over its layers: who sends what when, where it goes, and who sees which keys then.

Built once a step on every rank, from how the step is divided (``comm.sequence_split``); ``ring_attention`` carries it
out in every layer.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...comm.ring_order import Hop, ring_hops
from ...comm.sequence_split import Piece, StepDivision
from ...kernels.cpu.attention_keys import KeyLayout
from ...kernels.cpu.attention_partial_plan import Run, build_partial_plan
from ...kernels.cpu.attention_prefill_plan import PrefillGroup

Int32Array = NDArray[np.int32]

Turn = Mapping[int | None, tuple[PrefillGroup, ...]]
"""For each window, which of the rank's own tokens see which keys; tokens count from the first own one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RingBatch:
    """The pieces of one rank.

    ``first_token``: where they begin in the rank's batch; before it are the rows that all ranks compute. ``turns``:
    what is attended to before each hop has come, and after the last. Without turns, the attention of the whole batch
    waits for the last hop.

    Shapes: tokens_of_piece [2 * ranks]; slots, for each hop [tokens that it brings] int64
    """

    first_token: int
    tokens: int
    tokens_of_piece: tuple[int, ...]
    hops: tuple[Hop, ...]
    slots: tuple[Tensor, ...]
    turns: tuple[Turn, ...]


def build_ring_batch(
    division: StepDivision,
    *,
    block_tables: Int32Array,
    block_size: int,
    kv_heads: int,
    windows: Sequence[int | None],
    dtype: torch.dtype,
    device: torch.device,
    in_turns: bool,
) -> RingBatch:
    """Build a rank's ring of a divided step; ``in_turns`` false: without turns.

    Shapes: block_tables [rows of the step, most blocks]
    """
    hops = ring_hops(division.rank, division.ranks)
    brought = [_pieces_in(hop, division) for hop in hops]
    # Keys of earlier steps are there, and the rank's own.
    keys = [[*_before(division.own, division), *division.own], *brought] if in_turns else []
    layouts = {
        window: KeyLayout(block_size=block_size, kv_heads=kv_heads, window=window, dtype=dtype, device=device)
        for window in windows
    }
    return RingBatch(
        first_token=int(division.counts[division.whole].sum()),
        tokens=sum(piece.end - piece.start for piece in division.own),
        tokens_of_piece=tuple(division.tokens_of_piece),
        hops=hops,
        slots=tuple(torch.from_numpy(_slots(pieces, block_tables, block_size)).to(device) for pieces in brought),
        turns=tuple(
            {window: _groups(division.own, there, block_tables, layout) for window, layout in layouts.items()}
            for there in keys
        ),
    )


def _pieces_in(hop: Hop, division: StepDivision) -> list[Piece]:
    """Return what a hop brings, in the order of its tokens."""
    numbers = [number for parcel in hop.receives for number in parcel.pieces(division.ranks)]
    return [piece for number in numbers for piece in division.pieces[number]]


def _before(pieces: Sequence[Piece], division: StepDivision) -> list[Piece]:
    """Return what the rows of some pieces have computed in earlier steps."""
    starts = {piece.row: int(division.starts[piece.row]) for piece in pieces}
    return [Piece(row=row, start=0, end=start, token=0) for row, start in starts.items() if start]


def _slots(pieces: Sequence[Piece], block_tables: Int32Array, block_size: int) -> NDArray[np.int64]:
    """Return block * block_size + offset of each position of the pieces."""
    found = []
    for piece in pieces:
        positions = np.arange(piece.start, piece.end)
        blocks = block_tables[piece.row, positions // block_size].astype(np.int64)
        found.append(blocks * block_size + positions % block_size)
    return np.concatenate(found)


def _groups(
    own: Sequence[Piece], keys: Sequence[Piece], block_tables: Int32Array, layout: KeyLayout
) -> tuple[PrefillGroup, ...]:
    """Return the plans, one for each row, of the rank's own pieces and the keys that are there."""
    firsts = np.cumsum([0, *(piece.end - piece.start for piece in own)]).tolist()
    queries: dict[int, list[Run]] = {}
    for piece, token in zip(own, firsts, strict=False):
        queries.setdefault(piece.row, []).append(Run(start=piece.start, end=piece.end, token=token))
    plans = (
        build_partial_plan(runs, _runs([piece for piece in keys if piece.row == row]), block_tables[row], layout)
        for row, runs in queries.items()
    )
    return tuple(plan for plan in plans if plan is not None)


def _runs(pieces: Sequence[Piece]) -> list[Run]:
    """Return the positions of pieces, in order; those that follow one another are one run."""
    runs: list[Run] = []
    for piece in sorted(pieces, key=lambda piece: piece.start):
        if runs and runs[-1].end == piece.start:
            runs[-1] = Run(start=runs[-1].start, end=piece.end)
        else:
            runs.append(Run(start=piece.start, end=piece.end))
    return runs
