"""The weights of the experts that a rank has in its slots: multiplied one after the other, or all in one launch.

On GPUs plain weights are stacked, slot after slot, as the kernels take them (``kernels.moe_gemm``); as they are loaded
they lie so already. In any other format each slot has products of its own.

Shapes: T tokens, H hidden size, A chosen experts per token, R rows, S slots, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.backends import uses_triton
from ...kernels.gate import SILU, Gate
from ...kernels.moe_gemm import can_gate
from ...kernels.moe_mlp import StackedExperts, expert_products, moe_mlp, moe_mlp_stacked, stacked_products
from .linear import Biased
from .linear_format import PlainProduct, Product

SlotProducts = tuple[Product, Product]
"""What multiplies with an expert's gate|up and with its down weights."""


class Experts:
    """A layer's experts on one rank. ``slots``: each one's products."""

    def __init__(self, slots: Sequence[SlotProducts], gate: Gate = SILU) -> None:
        """Take the slots' products; plain weights on a GPU that are not one behind the other yet are copied so."""
        self.slots, self._gate = tuple(slots), gate
        gate_up, down = (_stacked(products) for products in zip(*slots, strict=True))
        self._stacked: StackedExperts | None = None
        if gate_up is not None and down is not None and can_gate(gate):
            self._stacked = StackedExperts(
                gate_up_EOH=gate_up[0],
                down_EHI=down[0],
                gate=gate,
                gate_up_biases_EO=gate_up[1],
                down_biases_EH=down[1],
            )
            # Weights that were copied are not kept twice.
            self.slots = tuple(zip(_separate(*gate_up), _separate(*down), strict=True))

    def mlp(self, x_TH: Tensor, weights_TA: Tensor, experts_TA: Tensor) -> Tensor:
        """As ``kernels.moe_mlp.moe_mlp``, of experts that are all here."""
        if self._stacked is not None and self._stacked.can_multiply(x_TH):
            return moe_mlp_stacked(x_TH, weights_TA, experts_TA, self._stacked)
        gate_up, down = zip(*self.slots, strict=True)
        return moe_mlp(x_TH, weights_TA, experts_TA, gate_up, down, self._gate)

    def products(self, rows_RH: Tensor, counts_S: Tensor) -> Tensor:
        """As ``kernels.moe_mlp.expert_products``, of the experts in these slots."""
        if self._stacked is not None and self._stacked.can_multiply(rows_RH):
            return stacked_products(rows_RH, counts_S, self._stacked)
        gate_up, down = zip(*self.slots, strict=True)
        return expert_products(rows_RH, counts_S, gate_up, down, self._gate)


def _stacked(products: Sequence[Product]) -> tuple[Tensor, Tensor | None] | None:
    """Return the weights of products as one tensor [slots, outputs, inputs], and their biases [slots, outputs] if they
    have any; None where kernels do not take them.
    """
    biases = [product.own_bias_O for product in products if isinstance(product, Biased)]
    plain = [product.product if isinstance(product, Biased) else product for product in products]
    weights = [product.weight_OI for product in plain if isinstance(product, PlainProduct)]
    if len(weights) < len(products) or len(biases) not in (0, len(products)):
        return None
    if not uses_triton("moe_gemm", weights[0]):
        return None
    return _side_by_side(weights), torch.stack(biases) if biases else None


def _separate(weights_SOI: Tensor, biases_SO: Tensor | None) -> Sequence[Product]:
    """Return the product of each slot."""
    products = [PlainProduct(weight_OI) for weight_OI in weights_SOI]
    if biases_SO is None:
        return products
    return [Biased(product, bias_O) for product, bias_O in zip(products, biases_SO, strict=True)]


def _side_by_side(weights: list[Tensor]) -> Tensor:
    """Return weights as one tensor: a view, where they are one behind the other, or else a copy."""
    first_OI = weights[0]
    if all(
        weight_OI.is_contiguous()
        and weight_OI.untyped_storage().data_ptr() == first_OI.untyped_storage().data_ptr()
        and weight_OI.storage_offset() == first_OI.storage_offset() + place * first_OI.numel()
        for place, weight_OI in enumerate(weights)
    ):
        return first_OI.as_strided((len(weights), *first_OI.shape), (first_OI.numel(), first_OI.shape[1], 1))
    return torch.stack(weights)
