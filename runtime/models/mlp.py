"""The MLPs of a layer: dense, and a mixture of experts; on one rank or spread over several.

Shapes: T tokens, H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...comm.collectives import Collectives
from ...comm.expert_map import map_of
from ...comm.groups import MeshGroups
from ...comm.overlap import Steps
from ...kernels.activation import silu_and_mul_quantized
from ...kernels.gate import SILU, Gate
from ...kernels.gated import gate_and_mul
from ...kernels.moe_combine import weighted_sum
from ...kernels.moe_route import Routing, Score, choose_experts
from ...kernels.moe_sort import sort_by_expert, unsort
from ...kernels.quantize_rows import ByteRows
from .expert_ranks import ExpertRanks
from .experts import Experts
from .linear import Linear
from .model_spec import DenseMlpSpec, MoeSpec
from .parallel import Output, summed
from .parameters import Parameters
from .sharding import Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMlp:
    """A gated MLP; gate and up are one product. ``tp``: the ranks that have its other columns."""

    gate_up: Linear
    down: Linear
    gate: Gate
    tp: Collectives | None

    @property
    def takes(self) -> torch.dtype | None:
        """As of ``Linear``."""
        return self.gate_up.takes

    def parts(self, x_TH: Tensor | ByteRows) -> Steps[Output]:
        """Return [tokens, hidden size], to be summed over ``tp``."""
        yield from ()
        gate_up_TI = self.gate_up(x_TH)
        if self.down.takes is None or self.gate != SILU:
            return Output(self.down(gate_and_mul(gate_up_TI, self.gate)), self.tp)
        values_TI, scales_T1 = silu_and_mul_quantized(gate_up_TI, self.down.takes)
        return Output(self.down(ByteRows(values_TI, scales_T1, gate_up_TI.dtype)), self.tp)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeMlp:
    """A mixture of gated MLPs; gate and up of an expert are one product.

    ``experts`` are all experts, of which ``tp`` ranks have the other columns; or those of this rank and how the others
    are reached. ``sums_rows``: the columns' sum is taken row by row, before experts' results are weighted, so that it
    has the bits of whole experts. ``shared``: what every token goes through besides.

    Shapes: correction_E [experts] float32, added to scores for the choice; None without
    """

    router: Linear
    is_wide_router: bool
    correction_E: Tensor | None
    experts: Experts | ExpertRanks
    routing: Routing
    tp: Collectives | None
    sums_rows: bool
    shared: DenseMlp | None

    @property
    def takes(self) -> torch.dtype | None:
        """None: the router and experts read hidden states as they are."""
        return None

    def parts(self, x_TH: Tensor | ByteRows) -> Steps[Output]:
        """Return [tokens, hidden size]; of columns over ``tp``, to be summed."""
        assert isinstance(x_TH, Tensor), "it takes no 8-bit numbers"
        routed = yield from self._routed(x_TH)
        if self.shared is None:
            return routed
        shared = yield from self.shared.parts(x_TH)
        if routed.group is shared.group:
            return Output(routed.x_TH.add_(shared.x_TH), routed.group)
        shared_TH = yield from summed(shared.x_TH, shared.group)
        return Output(routed.x_TH.add_(shared_TH))

    def _routed(self, x_TH: Tensor) -> Steps[Output]:
        if isinstance(self.experts, ExpertRanks):
            return Output((yield from self.experts.mix(x_TH, self._choose)))
        weights_TA, experts_TA = self._choose(x_TH)
        if self.tp is None or not self.sums_rows:
            return Output(self.experts.mlp(x_TH, weights_TA, experts_TA), self.tp)
        chosen = experts_TA.shape[1]
        order_R, counts_E = sort_by_expert(experts_TA.flatten(), len(self.experts.slots))
        rows_RH = x_TH.index_select(0, torch.div(order_R, chosen, rounding_mode="floor"))
        summed_RH = yield self.tp.all_reduce(self.experts.products(rows_RH, counts_E))
        return Output(weighted_sum(unsort(summed_RH, order_R).view(-1, chosen, x_TH.shape[1]), weights_TA))

    def _choose(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of each token's experts, and these."""
        scored_TH = x_TH.float() if self.is_wide_router else x_TH
        return choose_experts(self.router(scored_TH), self.routing, self.correction_E)


Mlp = DenseMlp | MoeMlp


def take_mlp(
    spec: DenseMlpSpec | MoeSpec,
    parameters: Parameters,
    name: str,
    *,
    groups: MeshGroups,
    shard: Shard,
    sums: Collectives | None,
) -> Mlp:
    """Return the MLP called ``name``. ``sums``: the tp ranks, as they add up what each has a part of."""
    if isinstance(spec, DenseMlpSpec):
        return _take_dense(spec, parameters, name, sums)
    slots = tuple(zip(parameters.experts(f"{name}.gate_up"), parameters.experts(f"{name}.down"), strict=True))
    over_experts = groups.tp if shard.experts_over_tp else groups.ep
    experts: Experts | ExpertRanks
    if over_experts is None:
        experts = Experts(slots, spec.gate)
    else:
        placed = map_of(shard.expert_placement(spec.num_experts), 0, device=parameters.device)
        columns_group = None if shard.experts_over_tp else groups.tp
        row_sums = sums if shard.fixed_order and columns_group is not None else None
        levels = groups.expert_levels
        experts = ExpertRanks(
            over_experts,
            placed,
            slots,
            gate=spec.gate,
            columns_group=columns_group,
            row_sums=row_sums,
            levels=levels,
        )
    return MoeMlp(
        router=parameters.linear(f"{name}.router"),
        is_wide_router=spec.router.is_wide,
        correction_E=parameters.tensor(f"{name}.correction") if spec.router.corrected else None,
        experts=experts,
        routing=_routing(spec),
        tp=sums,
        sums_rows=shard.fixed_order,
        shared=None if spec.shared is None else _take_dense(spec.shared, parameters, f"{name}.shared", sums),
    )


def _take_dense(spec: DenseMlpSpec, parameters: Parameters, name: str, sums: Collectives | None) -> DenseMlp:
    gate_up, down = parameters.linear(f"{name}.gate_up"), parameters.linear(f"{name}.down")
    return DenseMlp(gate_up=gate_up, down=down, gate=spec.gate, tp=sums)


def _routing(spec: MoeSpec) -> Routing:
    return Routing(
        top_k=spec.top_k,
        normalize=spec.normalize_top_k,
        score=Score.SIGMOID if spec.router.sigmoid else Score.SOFTMAX,
        groups=spec.router.groups,
        top_groups=spec.router.top_groups,
        sums_two=spec.router.sums_two,
        scaling=spec.router.scaling,
    )
