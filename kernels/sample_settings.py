"""What a draw is told, and what it gives: by row, whatever carries it out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

COLDEST_TEMPERATURE = 1e-5
"""Lower temperatures are greedy: their quotients would leave the range where float64 resolves the noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawSettings:
    """How to draw each row; host arrays, because which filters are on decides which work is done at all.

    Shapes: temperatures, top_ps, min_ps [R] float64; top_ks, seeds, positions [R] int64
    Temperature 0, top_p 1, top_k 0 and min_p 0 are off. Seeds are 64 bits in two's complement.
    """

    temperatures: NDArray[np.float64]
    top_ps: NDArray[np.float64]
    top_ks: NDArray[np.int64]
    min_ps: NDArray[np.float64]
    seeds: NDArray[np.int64]
    positions: NDArray[np.int64]

    def rows(self, start: int, stop: int) -> DrawSettings:
        """The settings of rows ``start`` to ``stop``."""
        return DrawSettings(
            temperatures=self.temperatures[start:stop],
            top_ps=self.top_ps[start:stop],
            top_ks=self.top_ks[start:stop],
            min_ps=self.min_ps[start:stop],
            seeds=self.seeds[start:stop],
            positions=self.positions[start:stop],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnTokens:
    """Drawn tokens. A row is not ``valid`` when its logits hold NaN or +inf or only -inf; its token means nothing then.

    Shapes: token_ids_R [R] int64, valid_R [R] bool
    """

    token_ids_R: Tensor
    valid_R: Tensor
