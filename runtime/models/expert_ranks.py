"""A layer's experts spread over the ranks of a group: each rank takes a share of the tokens through them.

All ranks of the group hold the same tokens when a layer's MLP begins, because attention is not spread over them. Each
routes its own share. Then, by the number of tokens, one of two ways that give the same bits:

- *exchanged* (``comm.experts``): tokens go to their experts and back, and the shares' outputs are gathered;
- *gathered* (``comm.expert_gather``): every rank computes its experts' rows for all tokens, and these are gathered.

Weights stay where they are in both, so a layer may go another way from one step to the next; and which expert lives
where may change between two steps (``switch``).

Shapes: T tokens, W tokens of a rank's share, H hidden size, A chosen experts per token, E experts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...comm.collectives import Collectives
from ...comm.expert_gather import mix_gathered, share_of
from ...comm.expert_map import ExpertMap
from ...comm.experts import Products, mix
from ...comm.level_gather import gather_rows
from ...comm.overlap import Parts
from ...kernels.gate import SILU, Gate
from ...kernels.moe_sort import count_by_expert
from .experts import Experts, SlotProducts

Route = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Chooses experts: x_TH [tokens, hidden] → weights_TA [tokens, chosen] float32, experts_TA [tokens, chosen] int64."""

NEVER, ALWAYS = 0, sys.maxsize
"""Values of ``most_gathered`` for one way whatever the number of tokens."""

_SAMPLED_TOKENS = 64
"""Tokens of a share, at most, whose choices are counted in pairs: enough over thousands of steps, and cheap."""


class ExpertRanks:
    """One layer's experts, seen from a rank of the group.

    ``load_E`` counts the tokens that this rank has routed to each expert, and ``pairs_EE``, if somebody has asked for
    that (``count_pairs``), those of a sample that chose both of two; whoever reads them may set them back.
    ``most_gathered``: steps of so many tokens and fewer are gathered; the same on all ranks.
    """

    def __init__(
        self,
        group: Collectives,
        placed: ExpertMap,
        slots: tuple[SlotProducts, ...],
        *,
        gate: Gate = SILU,
        columns_group: Collectives | None,
        row_sums: Collectives | None = None,
        levels: Sequence[Collectives] = (),
    ) -> None:
        """Take the group over which experts are spread, and the one over which each expert's columns are.

        ``slots``: the weights of this rank's slots. ``row_sums``: the columns' ranks again, where each row is summed
        over them before it is weighted. ``levels``: where the group is on several hosts, the levels of its
        exchange, as in ``comm.experts``.
        """
        self.group = group
        self._gate, self._experts = gate, Experts(slots, gate)
        self.most_gathered = NEVER
        self._levels = tuple(levels) or (group,)
        self._placed = placed
        self._columns_group = columns_group
        self._row_sums = row_sums
        self.load_E = torch.zeros(placed.num_experts, dtype=torch.int64, device=placed.slots_NE.device)
        self.pairs_EE: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """The experts of the layer, on all ranks."""
        return self._placed.num_experts

    @property
    def slots(self) -> tuple[SlotProducts, ...]:
        """The products of this rank's slots."""
        return self._experts.slots

    @property
    def groups(self) -> tuple[Collectives, ...]:
        """The groups whose ranks all go the same way: what is agreed on in each, one after the other, all know."""
        return (self.group,) if self._columns_group is None else (self.group, self._columns_group)

    def switch(self, placed: ExpertMap, slots: tuple[SlotProducts, ...]) -> None:
        """Use another placement from the next step on; all ranks of the group switch before the same step."""
        self._placed, self._experts = placed, Experts(slots, self._gate)

    def count_pairs(self) -> None:
        """Begin to count which experts are chosen together."""
        self.pairs_EE = self.load_E.new_zeros((self.num_experts, self.num_experts), dtype=torch.int32)

    def mix(self, x_TH: Tensor, route: Route) -> Parts:
        """Return each token's weighted sum over its experts, on every rank of the group.

        Shapes: x_TH [tokens, hidden], the same on all ranks; returns [tokens, hidden]
        """
        tokens = x_TH.shape[0]
        own_WH = x_TH[share_of(tokens, self.group.rank, self.group.size)]
        weights_WA, experts_WA = route(own_WH)
        self._count(experts_WA)
        products = self._experts.products
        if tokens <= self.most_gathered:
            output_TH = yield from mix_gathered(
                self._levels,
                x_TH,
                weights_WA,
                experts_WA,
                placed=self._placed,
                products=products,
                columns=self._row_sums,
            )
            return (yield from self._summed(output_TH))
        return (yield from self._exchanged(own_WH, weights_WA, experts_WA, products, tokens))

    def _exchanged(
        self, own_WH: Tensor, weights_WA: Tensor, experts_WA: Tensor, products: Products, tokens: int
    ) -> Parts:
        mixed = yield from mix(
            self._levels,
            own_WH,
            weights_WA,
            experts_WA,
            placed=self._placed,
            products=products,
            columns=self._row_sums,
        )
        output_WH = yield from self._summed(mixed.output_TH)
        share_WH = output_WH.new_zeros((-(-tokens // self.group.size), output_WH.shape[1]))
        share_WH[: output_WH.shape[0]] = output_WH
        return (yield from gather_rows(self._levels, share_WH))[:tokens]

    def _summed(self, output_TH: Tensor) -> Parts:
        """Return the sum over the ranks that have the other columns of the same experts."""
        if self._columns_group is None or self._row_sums is not None:
            return output_TH
        return (yield self._columns_group.all_reduce(output_TH))

    def _count(self, experts_WA: Tensor) -> None:
        self.load_E += count_by_expert(experts_WA.flatten(), self.num_experts)
        if self.pairs_EE is not None and len(experts_WA):
            some_SA = experts_WA[:: -(-len(experts_WA) // _SAMPLED_TOKENS)]
            pair_K = (some_SA[:, :, None] * self.num_experts + some_SA[:, None, :]).flatten()
            self.pairs_EE.view(-1).scatter_add_(0, pair_K, torch.ones_like(pair_K, dtype=torch.int32))
