"""A linear layer: a weight in some format, and perhaps a bias.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.quantize_rows import ByteRows
from .linear_format import Product
from .linear_format_gpu import ByteProduct


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

    def __call__(self, x_TI: Tensor | ByteRows) -> Tensor:
        """Return [tokens, outputs]; of rows in 8 bits only if it ``takes`` such."""
        if isinstance(x_TI, Tensor):
            return self.product(x_TI, self.bias_O)
        assert isinstance(self.product, ByteProduct), "it takes no 8-bit numbers"
        return self.product.of_rows(x_TI, self.bias_O)

    @property
    def takes(self) -> torch.dtype | None:
        """The type of 8-bit numbers that activations are turned into, which may be done before; None for none."""
        return self.product.takes if isinstance(self.product, ByteProduct) else None
