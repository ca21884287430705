"""Rows of all ranks brought to every rank, level by level: over two levels, a row crosses to each host once.

Levels are those of ``experts``: from the outermost, the last counting fastest in a rank's number.

Shapes: W rows of each rank, K rows of all ranks together, N ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .collectives import Collectives
from .expert_hop import movable
from .overlap import Parts


def place_in(levels: Sequence[Collectives]) -> tuple[int, int]:
    """Return this rank's number over all levels, and how many there are."""
    rank = 0
    for level in levels:
        rank = rank * level.size + level.rank
    return rank, math.prod(level.size for level in levels)


def gather_rows(levels: Sequence[Collectives], rows_WH: Tensor) -> Parts:
    """Return the rows of all ranks, in the order of their numbers.

    Shapes: rows_WH [rows, ...] contiguous, the same on all ranks; returns [ranks * rows, ...]
    """
    gathered = rows_WH
    for level in levels:
        gathered = yield level.all_gather(gathered)
    if len(levels) > 1:
        # Each level has put its own ranks before what was there.
        sizes = [level.size for level in levels]
        by_level = gathered.view(*reversed(sizes), *rows_WH.shape)
        inner = range(len(sizes), by_level.dim())
        gathered = by_level.permute(*reversed(range(len(sizes))), *inner).reshape(-1, *rows_WH.shape[1:])
    return gathered


def gather_counted_rows(levels: Sequence[Collectives], rows_KH: Tensor, counts_N: Sequence[int]) -> Parts:
    """Return the rows of all ranks, in the order of their numbers, where ranks have different numbers of rows.

    ``counts_N`` says how many, and is the same on all ranks.

    Shapes: rows_KH [this rank's rows, hidden]; returns [sum(counts_N), hidden]
    """
    place, ranks = place_in(levels)
    held, behind = [place], ranks
    gathered = movable(rows_KH)
    for level in levels:
        behind //= level.size
        # What a rank of this level holds is what this one does, but for this level's digit of their numbers.
        theirs = [[rank + (other - level.rank) * behind for rank in held] for other in range(level.size)]
        gathered = yield level.all_to_all(
            gathered.repeat(level.size, 1),
            send_counts=(len(gathered),) * level.size,
            receive_counts=[sum(counts_N[rank] for rank in own) for own in theirs],
        )
        held = [rank for own in theirs for rank in own]
    if len(levels) > 1:
        parts = dict(zip(held, gathered.split([counts_N[rank] for rank in held]), strict=True))
        gathered = torch.cat([parts[rank] for rank in range(ranks)])
    return gathered.view(rows_KH.dtype)
