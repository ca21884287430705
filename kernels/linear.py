"""The matrix product with weights.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch.nn.functional as functional
from torch import Tensor


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``.

    Shapes: x_TI [tokens, inputs]; weight_OI [outputs, inputs] contiguous; bias_O [outputs]; all of one float
    type
    """
    return functional.linear(x_TI, weight_OI, bias_O)
