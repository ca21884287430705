"""Where the tokens of a step are cut, if at all, on devices whose time per token is even. Pure.

For GPUs, where time comes in waves of tiles, see ``overlap_waves``.

Source: TokenWeave (arXiv 2505.11329), section 3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

from .overlap_cost import PassCost

Cuts: TypeAlias = tuple[int, ...]
"""After how many tokens of a step it is cut: increasing, one less than there are parts."""

PIECES = (2, 3, 4)
"""The numbers of parts that are tried. A part's wire time is hidden by the others' compute until its next turn: between
attention and MLP that is short, and more parts make it longer; each part reads all weights again."""

_NEAR_HALF = 3
"""Cuts that are tried on either side of the middle, in units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPiece:
    """A run of tokens of one row: ``tokens`` of them from the row's ``first``-th on."""

    row: int
    first: int
    tokens: int


def choose_cuts(
    cost: PassCost, tokens: int, *, pieces: int = 2, unit: int = 32, fewest_tokens: int = 0, margin: float = 0.03
) -> Cuts | None:
    """Return where to cut into so many ``pieces``, or None where the whole is expected to be as fast.

    ``unit``: cuts are multiples of it, because the rows of products are filled up to it anyway, and all parts have as
    many tokens at least. ``margin``: the gain that is expected at least, as a share of the uncut time, for what the
    cost model does not know.
    """
    if tokens < max(fewest_tokens, pieces * unit):
        return None
    if pieces == 2:
        middle = round(tokens / 2 / unit)
        counts = range(max(1, middle - _NEAR_HALF), middle + _NEAR_HALF + 1)
        choices: list[Cuts] = [(unit * count,) for count in counts if unit * count <= tokens - unit]
    else:
        choices = [tuple(unit * (tokens // unit * piece // pieces) for piece in range(1, pieces))]
    # Of equal ones, the nearest to the middle.
    best_s, _, best = min(
        (cost.overlapped_s(part_sizes(cuts, tokens)), abs(2 * cuts[0] - tokens), cuts) for cuts in choices
    )
    return best if best_s < cost.serial_s(tokens) * (1 - margin) else None


def cuts_worth_trying(cost: PassCost, tokens: int, *, unit: int = 32) -> list[Cuts]:
    """Return, for each number of pieces with which a gain is expected, where to cut."""
    chosen = (choose_cuts(cost, tokens, pieces=pieces, unit=unit) for pieces in PIECES)
    return [cuts for cuts in chosen if cuts is not None]


def part_sizes(cuts: Cuts, tokens: int) -> list[int]:
    """Return how many tokens each part has."""
    return [end - begin for begin, end in zip((0, *cuts), (*cuts, tokens), strict=True)]


def cut_rows(row_lengths: Sequence[int], cuts: Cuts) -> list[list[RowPiece]]:
    """Cut rows, laid out one after the other, at ``cuts``: what belongs to each part, in order.

    A row that a cut goes through is in both parts; its later piece attends to keys that the earlier one wrote.

    Raises: ValueError if a part would be empty
    """
    total = sum(row_lengths)
    if min(part_sizes(cuts, total)) < 1:
        raise ValueError(f"cuts after {', '.join(map(str, cuts))} of {total} tokens leave a part empty")
    parts: list[list[RowPiece]] = []
    row_ends = list(accumulate(row_lengths))
    for begin, end in zip((0, *cuts), (*cuts, total), strict=True):
        pieces = []
        for row, (length, row_end) in enumerate(zip(row_lengths, row_ends, strict=True)):
            row_begin = row_end - length
            first, last = max(begin, row_begin), min(end, row_end)
            if first < last:
                pieces.append(RowPiece(row=row, first=first - row_begin, tokens=last - first))
        parts.append(pieces)
    return parts
