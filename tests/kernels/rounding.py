"""How far results are from a formula in float64, when both a sum and what it is rounded to have errors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def worst_error(found: Tensor, expected: NDArray[np.float64]) -> float:
    """Return the largest error, each divided by one and the number's size.

    Sums of numbers about one have errors about as large whatever they come to; what they come to is then rounded, the
    coarser the larger it is. A bound on the error alone would be passed by chance, where a draw is large.
    """
    wide = found.double().numpy()
    return float((np.abs(wide - expected) / (1 + np.abs(expected))).max())
