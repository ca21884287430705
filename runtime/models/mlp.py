"""The MLPs of a layer: dense, and a mixture of experts; on one rank or spread over several.

Shapes: T tokens, H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ...comm.collectives import Collectives
from ...comm.expert_map import map_of
from ...comm.groups import MeshGroups
from ...comm.overlap import Steps
from ...kernels.activation import silu_and_mul
from ...kernels.moe_mlp import moe_mlp
from ...kernels.moe_route import route
from .expert_ranks import ExpertRanks, SlotProducts
from .linear import Linear
from .model_spec import DenseMlpSpec, MoeSpec
from .parallel import Output
from .parameters import Parameters
from .sharding import Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMlp:
    """A gated MLP; gate and up are one product. ``tp``: the ranks that have its other columns."""

    gate_up: Linear
    down: Linear
    tp: Collectives | None

    def parts(self, x_TH: Tensor) -> Steps[Output]:
        """Return [tokens, hidden size], to be summed over ``tp``."""
        yield from ()
        return Output(self.down(silu_and_mul(self.gate_up(x_TH))), self.tp)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeMlp:
    """A mixture of gated MLPs; gate and up of an expert are one product.

    ``experts`` are all experts, of which ``tp`` ranks have the other columns; or those of this rank and how the others
    are reached.

    Shapes: router_EH [experts, hidden] contiguous
    """

    router_EH: Tensor
    experts: tuple[SlotProducts, ...] | ExpertRanks
    top_k: int
    normalize_top_k: bool
    tp: Collectives | None

    def parts(self, x_TH: Tensor) -> Steps[Output]:
        """Return [tokens, hidden size]; of columns over ``tp``, to be summed."""
        choose = partial(route, gate_EH=self.router_EH, top_k=self.top_k, normalize=self.normalize_top_k)
        if isinstance(self.experts, ExpertRanks):
            return Output((yield from self.experts.mix(x_TH, choose)))
        weights_TA, experts_TA = choose(x_TH)
        gate_up, down = zip(*self.experts, strict=True)
        return Output(moe_mlp(x_TH, weights_TA, experts_TA, gate_up, down), self.tp)


Mlp = DenseMlp | MoeMlp


def take_mlp(
    spec: DenseMlpSpec | MoeSpec, parameters: Parameters, name: str, *, groups: MeshGroups, shard: Shard
) -> Mlp:
    """Return the MLP called ``name``."""
    if isinstance(spec, DenseMlpSpec):
        return DenseMlp(
            gate_up=parameters.linear(f"{name}.gate_up"), down=parameters.linear(f"{name}.down"), tp=groups.tp
        )
    router_EH = parameters.tensor(f"{name}.router")
    slots = tuple(zip(parameters.experts(f"{name}.gate_up"), parameters.experts(f"{name}.down"), strict=True))
    over_experts = groups.tp if shard.experts_over_tp else groups.ep
    experts: tuple[SlotProducts, ...] | ExpertRanks = slots
    if over_experts is not None:
        placed = map_of(shard.expert_placement(spec.num_experts), 0, device=router_EH.device)
        columns_group = None if shard.experts_over_tp else groups.tp
        levels = groups.expert_levels
        experts = ExpertRanks(over_experts, placed, slots, columns_group=columns_group, levels=levels)
    return MoeMlp(
        router_EH=router_EH,
        experts=experts,
        top_k=spec.top_k,
        normalize_top_k=spec.normalize_top_k,
        tp=groups.tp,
    )
