"""A layer's experts spread over the ranks of a group: each rank takes a share of the tokens through them.

All ranks of the group hold the same tokens when a layer's MLP begins, because attention is not spread over them. Each
routes its own share, the exchange (``comm.experts``) brings tokens to their experts and back, and the shares are put
together again. Which expert lives where may change between two steps (``switch``).

Shapes: T tokens, H hidden size, A chosen experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...comm.collectives import Collectives
from ...comm.expert_map import ExpertMap
from ...comm.experts import mix
from ...comm.overlap import Parts
from ...kernels.moe_gemm import expert_products
from .linear_format import Product

Route = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Chooses experts: x_TH [tokens, hidden] → weights_TA [tokens, chosen] float32, experts_TA [tokens, chosen] int64."""

SlotProducts = tuple[Product, Product]
"""What multiplies with an expert's gate|up and with its down weights."""


class ExpertRanks:
    """One layer's experts, seen from a rank of the group.

    ``load_E`` counts the tokens that this rank has routed to each expert; whoever reads it may set it back.
    """

    def __init__(
        self,
        group: Collectives,
        placed: ExpertMap,
        slots: tuple[SlotProducts, ...],
        *,
        columns_group: Collectives | None,
    ) -> None:
        """Take the group over which experts are spread, and the one over which each expert's columns are.

        ``slots``: the weights of this rank's slots.
        """
        self.group = group
        self.slots = slots
        self._placed = placed
        self._columns_group = columns_group
        self.load_E = torch.zeros(placed.num_experts, dtype=torch.int64)

    @property
    def num_experts(self) -> int:
        """The experts of the layer, on all ranks."""
        return self._placed.num_experts

    def switch(self, placed: ExpertMap, slots: tuple[SlotProducts, ...]) -> None:
        """Use another placement from the next step on; all ranks of the group switch before the same step."""
        self._placed, self.slots = placed, slots

    def mix(self, x_TH: Tensor, route: Route) -> Parts:
        """Return each token's weighted sum over its experts, on every rank of the group.

        Shapes: x_TH [tokens, hidden], the same on all ranks; returns [tokens, hidden]
        """
        tokens, (rank, ranks) = x_TH.shape[0], (self.group.rank, self.group.size)
        widest = -(-tokens // ranks)
        own_TH = x_TH[rank * widest : (rank + 1) * widest]
        weights_TA, experts_TA = route(own_TH)
        gate_up, down = zip(*self.slots, strict=True)
        products = partial(expert_products, gate_up=gate_up, down=down)
        mixed = yield from mix((self.group,), own_TH, weights_TA, experts_TA, placed=self._placed, products=products)
        self.load_E += mixed.load_E.to(self.load_E.device)
        output_TH = mixed.output_TH
        if self._columns_group is not None:
            output_TH = yield self._columns_group.all_reduce(output_TH)
        share_WH = output_TH.new_zeros((widest, x_TH.shape[1]))
        share_WH[: output_TH.shape[0]] = output_TH
        return (yield self.group.all_gather(share_WH))[:tokens]
