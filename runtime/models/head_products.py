"""Products of each head's numbers with a matrix of its own: what is folded into the queries and results of latent
attention.

Shapes: T tokens, N heads, I inputs, O outputs of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .linear_format import LinearFormat, PlainFormat

HeadProducts = Callable[[Tensor], Tensor]
"""Multiplies: x_TNI [tokens, heads, inputs] → [tokens, heads, outputs] of x's type."""


def head_products(weight_NIO: Tensor, weight_format: LinearFormat) -> HeadProducts:
    """Return the products with ``weight_NIO``: all heads at once, or where ``weight_format`` is not the plain one, so
    that a row's bits are its own, one after the other in it.

    Shapes: weight_NIO [heads, inputs, outputs]
    """
    if isinstance(weight_format, PlainFormat):
        return lambda x_TNI: torch.bmm(x_TNI.transpose(0, 1), weight_NIO).transpose(0, 1)
    products = [weight_format.prepare(weight_IO.T.contiguous()) for weight_IO in weight_NIO]
    return lambda x_TNI: torch.stack(
        [product(x_TI.contiguous(), None) for product, x_TI in zip(products, x_TNI.unbind(1), strict=True)], dim=1
    )
