"""How a step's long rows are divided over sequence-parallel ranks. Pure: arrays in, arrays out.

A row is a run of positions of one sequence. Rows of at least ``fewest_tokens`` are cut into pieces (``ring_order``),
at multiples of ``grain`` positions, so that no two pieces share a block of the cache; the others are computed on every
rank. A step's tokens count as they stand in its rows; a rank's own are those of the rows that all compute, then its
early pieces, then its late ones, each in the order of the rows.

Shapes: R rows, n ranks, T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .ring_order import pieces_of

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Positions ``start`` to ``end`` of a row, which begin at ``token`` of the step."""

    row: int
    start: int
    end: int
    token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDivision:
    """A step that is divided, as one rank sees it: the rows that all compute, and the pieces of each number.

    Shapes: starts, counts [rows] int64, of the step; whole [rows that all compute] int64; pieces, 2 * ranks, each in
    the order of the rows
    """

    rank: int
    ranks: int
    starts: Int64Array
    counts: Int64Array
    whole: Int64Array
    pieces: tuple[tuple[Piece, ...], ...]

    @property
    def tokens_of_piece(self) -> list[int]:
        """The tokens of the pieces of each number, over all rows."""
        return [sum(piece.end - piece.start for piece in pieces) for pieces in self.pieces]

    @property
    def own(self) -> list[Piece]:
        """The rank's pieces: the early ones, then the late ones."""
        return self.pieces_of(self.rank)

    def pieces_of(self, rank: int) -> list[Piece]:
        """Return the pieces of any rank, as ``own``."""
        return [piece for number in pieces_of(rank, self.ranks) for piece in self.pieces[number]]

    @property
    def num_tokens(self) -> int:
        """How many tokens the rank computes."""
        return sum(piece.end - piece.start for piece in self.computed)

    @property
    def computed(self) -> list[Piece]:
        """All that the rank computes, in the order of its tokens; rows that all compute are pieces of their own."""
        first_tokens = np.cumsum(self.counts) - self.counts
        whole = [
            Piece(row=row, start=start, end=start + count, token=token)
            for row, start, count, token in zip(
                self.whole.tolist(),
                self.starts[self.whole].tolist(),
                self.counts[self.whole].tolist(),
                first_tokens[self.whole].tolist(),
                strict=True,
            )
        ]
        return whole + self.own


class SequenceSplit:
    """The rule by which one rank of ``ranks`` sees steps divided; all ranks have the same but for ``rank``.

    A row is divided if it has ``fewest_tokens``, and enough of them for every piece to have some.
    """

    def __init__(self, *, rank: int, ranks: int, fewest_tokens: int, grain: int) -> None:
        self.rank = rank
        self.ranks = ranks
        self._grain = grain
        self._fewest_tokens = max(fewest_tokens, 2 * ranks * grain)

    def divide(self, starts: Int32Array, counts: Int32Array) -> StepDivision | None:
        """Return how a step's rows are divided; None where all are short.

        Shapes: starts, counts [rows]
        """
        divided = counts >= self._fewest_tokens
        if not divided.any():
            return None
        starts64, counts64 = starts.astype(np.int64), counts.astype(np.int64)
        first_tokens = np.cumsum(counts64) - counts64
        pieces: list[list[Piece]] = [[] for _ in range(2 * self.ranks)]
        for row in np.flatnonzero(divided).tolist():
            borders = self._borders(int(starts64[row]), int(counts64[row]))
            for number, (start, end) in enumerate(itertools.pairwise(borders)):
                token = int(first_tokens[row]) + start - borders[0]
                pieces[number].append(Piece(row=row, start=start, end=end, token=token))
        return StepDivision(
            rank=self.rank,
            ranks=self.ranks,
            starts=starts64,
            counts=counts64,
            whole=np.flatnonzero(~divided),
            pieces=tuple(map(tuple, pieces)),
        )

    def _borders(self, start: int, count: int) -> list[int]:
        """Return where a row's pieces begin, and its end: rounded down, so the last piece, rank 0's, has some more."""
        pieces = 2 * self.ranks
        inner = [(start + number * count // pieces) // self._grain * self._grain for number in range(1, pieces)]
        return [start, *inner, start + count]


def tokens_of(pieces: Sequence[Piece]) -> Int64Array:
    """Return which tokens of the step pieces are, one piece after the other; there is at least one."""
    return np.concatenate([np.arange(piece.token, piece.token + piece.end - piece.start) for piece in pieces])
