"""A linear layer: a weight in some format, and perhaps a bias."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .linear_format import Product


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """Shapes: bias_O [outputs]."""

    product: Product
    bias_O: Tensor | None

    def __call__(self, x_TI: Tensor) -> Tensor:
        """Return [tokens, outputs]."""
        return self.product(x_TI, self.bias_O)
