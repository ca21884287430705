"""A layer's experts spread over the ranks of a group: each rank takes a share of the tokens through them.

All ranks of the group hold the same tokens when a layer's MLP begins, because attention is not spread over them. Each
routes its own share, the exchange (``comm.experts``) brings tokens to their experts and back, and the shares are put
together again. Which expert lives where is the ``ExpertMap``'s business; it may change between two steps.

Shapes: T tokens, H hidden size, A chosen experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...comm.collectives import Collectives
from ...comm.expert_map import ExpertMap, expert_map
from ...comm.experts import Products, mix
from ...comm.overlap import Parts
from .sharding import Shard

Route = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Chooses experts: x_TH [tokens, hidden] → weights_TA [tokens, chosen] float32, experts_TA [tokens, chosen] int64."""


class ExpertRanks:
    """One layer's experts, seen from a rank of the group.

    ``load_E`` counts the tokens that this rank has routed to each expert since it was made.
    """

    def __init__(self, group: Collectives, placed: ExpertMap, *, columns_group: Collectives | None) -> None:
        """Take the group over which experts are spread, and the one over which each expert's columns are."""
        self._group = group
        self._placed = placed
        self._columns_group = columns_group
        self.load_E = torch.zeros(placed.num_experts, dtype=torch.int64)

    def mix(self, x_TH: Tensor, route: Route, products: Products) -> Parts:
        """Return each token's weighted sum over its experts, on every rank of the group.

        Shapes: x_TH [tokens, hidden], the same on all ranks; returns [tokens, hidden]
        """
        tokens, (rank, ranks) = x_TH.shape[0], (self._group.rank, self._group.size)
        widest = -(-tokens // ranks)
        own_TH = x_TH[rank * widest : (rank + 1) * widest]
        weights_TA, experts_TA = route(own_TH)
        mixed = yield from mix((self._group,), own_TH, weights_TA, experts_TA, placed=self._placed, products=products)
        self.load_E += mixed.load_E.to(self.load_E.device)
        output_TH = mixed.output_TH
        if self._columns_group is not None:
            output_TH = yield self._columns_group.all_reduce(output_TH)
        share_WH = output_TH.new_zeros((widest, x_TH.shape[1]))
        share_WH[: output_TH.shape[0]] = output_TH
        return (yield self._group.all_gather(share_WH))[:tokens]


def initial_map(num_experts: int, shard: Shard, *, ranks: int, device: torch.device) -> ExpertMap:
    """Return the map by which ranks have read their experts: each once, neighbours together."""
    owners = [shard.experts_of(num_experts, rank) for rank in range(ranks)]
    slots_per_rank = max(len(experts) for experts in owners)
    slots_E1 = torch.empty((num_experts, 1), dtype=torch.int64)
    for rank, experts in enumerate(owners):
        slots_E1[list(experts), 0] = rank * slots_per_rank + torch.arange(len(experts))
    return expert_map(slots_E1, ranks=ranks, slots_per_rank=slots_per_rank, device=device)
