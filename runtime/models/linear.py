"""A linear layer: a weight in some format, and perhaps a bias.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .linear_format import Product


@dataclass(frozen=True, slots=True)
class Biased:
    """A product that adds a bias of its own. Shapes: own_bias_O [outputs]"""

    product: Product
    own_bias_O: Tensor

    def __call__(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """Return [tokens, outputs]."""
        assert bias_O is None, "it has one of its own"
        return self.product(x_TI, self.own_bias_O)


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """Shapes: bias_O [outputs]."""

    product: Product
    bias_O: Tensor | None

    def __call__(self, x_TI: Tensor) -> Tensor:
        """Return [tokens, outputs]."""
        return self.product(x_TI, self.bias_O)
