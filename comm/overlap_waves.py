"""Where the tokens of a step are cut in two on a GPU, whose products take time in waves of tiles. Pure.

A product's output is cut into tiles, and as many are computed at a time as there are multiprocessors: one tile more
than fits takes a wave more. Two parts that are cut anywhere can need a wave more than the whole for every product,
which costs more than a short collective; cut where waves are full they need none.

Source: TokenWeave (arXiv 2505.11329), section 3.1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How a GPU computes products: multiprocessors that are left for them, and the size of a tile of the output."""

    multiprocessors: int
    rows: int = 128
    columns: int = 128

    def waves(self, tokens: int, outputs: Sequence[int]) -> int:
        """Return the waves of products of ``tokens`` rows, one for each number of ``outputs``, one after the other."""
        rows = _over(tokens, self.rows)
        return sum(_over(rows * _over(columns, self.columns), self.multiprocessors) for columns in outputs)


def choose_wave_cut(
    tiles: Tiles, tokens: int, outputs: Sequence[int], *, fewest_tokens: int, most_extra_waves: int = 0
) -> int | None:
    """Return how many tokens the first part has, or None if there are too few or the parts need too many waves.

    ``outputs`` are the columns of a layer's products. Of the cuts with the fewest waves, the nearest to the middle.
    """
    if tokens < max(fewest_tokens, tiles.rows + 1):
        return None
    cuts = range(tiles.rows, tokens, tiles.rows)
    waves, _, cut = min(
        (tiles.waves(cut, outputs) + tiles.waves(tokens - cut, outputs), abs(2 * cut - tokens), cut) for cut in cuts
    )
    return cut if waves <= tiles.waves(tokens, outputs) + most_extra_waves else None


def _over(count: int, size: int) -> int:
    return -(-count // size)
