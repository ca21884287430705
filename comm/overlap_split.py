"""Where the tokens of a step are cut in two, if at all, on devices whose time per token is even. Pure.

For GPUs, where time comes in waves of tiles, see ``overlap_waves``.

Source: TokenWeave (arXiv 2505.11329), section 3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .overlap_cost import PassCost

_NEAR_HALF = 3
"""Cuts that are tried on either side of the middle, in units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPiece:
    """A run of tokens of one row: ``tokens`` of them from the row's ``first``-th on."""

    row: int
    first: int
    tokens: int


def choose_cut(
    cost: PassCost, tokens: int, *, unit: int = 32, fewest_tokens: int = 0, margin: float = 0.03
) -> int | None:
    """Return how many tokens the first part has, or None where the whole is expected to be as fast.

    ``unit``: cuts are multiples of it, because the rows of products are filled up to it anyway, and both parts have as
    many tokens at least. ``margin``: the gain that is expected at least, as a share of the uncut time, for what the
    cost model does not know.
    """
    if tokens < max(fewest_tokens, 2 * unit):
        return None
    middle = round(tokens / 2 / unit)
    cuts = [unit * count for count in range(max(1, middle - _NEAR_HALF), middle + _NEAR_HALF + 1)]
    cuts = [cut for cut in cuts if cut <= tokens - unit]
    # Of equal ones, the nearest to the middle.
    best_s, _, best = min((cost.overlapped_s(cut, tokens - cut), abs(2 * cut - tokens), cut) for cut in cuts)
    return best if best_s < cost.serial_s(tokens) * (1 - margin) else None


def cut_rows(row_lengths: Sequence[int], cut: int) -> tuple[list[RowPiece], list[RowPiece]]:
    """Cut rows, laid out one after the other, after ``cut`` tokens: what belongs to either part, in order.

    A row that the cut goes through is in both parts; its second piece attends to keys that the first wrote.

    Raises: ValueError if a part would be empty
    """
    total = sum(row_lengths)
    if not 0 < cut < total:
        raise ValueError(f"a cut after {cut} of {total} tokens leaves a part empty")
    parts: tuple[list[RowPiece], list[RowPiece]] = ([], [])
    begin = 0
    for row, length in enumerate(row_lengths):
        before = min(max(cut - begin, 0), length)
        if before:
            parts[0].append(RowPiece(row=row, first=0, tokens=before))
        if before < length:
            parts[1].append(RowPiece(row=row, first=before, tokens=length - before))
        begin += length
    return parts
