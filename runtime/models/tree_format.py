"""Weights whose products are summed over ranks, in an order that is the same for every number of ranks.

The inputs are cut into ``LEAVES`` equal chunks (``kernels.tree_sum``); each is a weight of its own in the format that
the others have, and its product is float32. A rank that has all inputs adds all leaves up and rounds once. One of
several ranks returns the float32 sum of its subtree, and the group adds those (``comm.tree_sum``). A bias belongs to
the first leaf, so to the rank that has it.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ...kernels.linear_fixed import fixed_linear
from ...kernels.tree_sum import LEAVES, add_pairs, subtree_leaves
from .linear_format import FixedFormat, LinearFormat, Product


class TreeFormat:
    """A format of ``ranks`` that share a sum, on top of the one that other weights have."""

    def __init__(self, leaf_format: LinearFormat, *, ranks: int) -> None:
        self._leaf_format = leaf_format
        self._leaves = subtree_leaves(ranks)
        self._is_whole = ranks == 1
        assert self._leaves, "degrees that do not fit are refused before"

    def prepare(self, weight_OI: Tensor, *, wide: bool = False) -> Product:
        """Take the rank's inputs of a weight [outputs, inputs]. ``wide``: the sum is float32 in any case."""
        dtype = weight_OI.dtype if self._is_whole and not wide else torch.float32
        inputs = weight_OI.shape[1]
        if inputs % self._leaves:
            # Only a rank with all inputs comes here: nothing has to be the same elsewhere.
            assert self._leaves == LEAVES, "sums that do not divide are refused before"
            return self._leaf_format.prepare(weight_OI, wide=wide)
        if isinstance(self._leaf_format, FixedFormat):
            weight_OI = weight_OI.contiguous()
            return lambda x_TI, bias_O: fixed_linear(x_TI, weight_OI, bias_O, leaves=self._leaves, dtype=dtype)
        leaves = [self._leaf_format.prepare(leaf_OI, wide=True) for leaf_OI in weight_OI.chunk(self._leaves, dim=1)]
        return partial(_tree_product, leaves, inputs // self._leaves, dtype)

    def prepare_head(self, weight_OI: Tensor) -> Product:
        """Take a head: it is summed over no ranks."""
        return self._leaf_format.prepare_head(weight_OI)


def _tree_product(
    leaves: Sequence[Product], leaf_inputs: int, dtype: torch.dtype, x_TI: Tensor, bias_O: Tensor | None
) -> Tensor:
    parts = [
        product(x_TI[:, place * leaf_inputs : (place + 1) * leaf_inputs], bias_O if place == 0 else None)
        for place, product in enumerate(leaves)
    ]
    return add_pairs(parts, dtype)
