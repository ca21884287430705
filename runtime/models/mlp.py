"""The MLPs of a layer: dense, and a mixture of experts; on one rank or spread over several.

Shapes: T tokens, H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ...comm.collectives import Collectives
from ...comm.groups import MeshGroups
from ...comm.overlap import Parts
from ...kernels.activation import silu_and_mul
from ...kernels.moe_gemm import expert_products, moe_mlp
from ...kernels.moe_route import route
from .expert_ranks import ExpertRanks, initial_map
from .linear import Linear
from .linear_format import Product
from .model_spec import DenseMlpSpec, MoeSpec
from .parallel import summed
from .parameters import Parameters
from .sharding import Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMlp:
    """A gated MLP; gate and up are one product. ``tp``: the ranks that have its other columns."""

    gate_up: Linear
    down: Linear
    tp: Collectives | None

    def parts(self, x_TH: Tensor) -> Parts:
        """Return [tokens, hidden size]."""
        return (yield from summed(self.down(silu_and_mul(self.gate_up(x_TH))), self.tp))


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeMlp:
    """A mixture of gated MLPs; gate and up of an expert are one product.

    ``tp``: the ranks that have the experts' other columns; ``ranks``: those that have the other experts.

    Shapes: router_EH [experts, hidden] contiguous
    """

    router_EH: Tensor
    gate_up: tuple[Product, ...]
    down: tuple[Product, ...]
    top_k: int
    normalize_top_k: bool
    tp: Collectives | None
    ranks: ExpertRanks | None

    def parts(self, x_TH: Tensor) -> Parts:
        """Return [tokens, hidden size]."""
        choose = partial(route, gate_EH=self.router_EH, top_k=self.top_k, normalize=self.normalize_top_k)
        if self.ranks is not None:
            products = partial(expert_products, gate_up=self.gate_up, down=self.down)
            return (yield from self.ranks.mix(x_TH, choose, products))
        weights_TA, experts_TA = choose(x_TH)
        return (yield from summed(moe_mlp(x_TH, weights_TA, experts_TA, self.gate_up, self.down), self.tp))


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
    over_experts = groups.tp if shard.experts_over_tp else groups.ep
    ranks = None
    if over_experts is not None:
        placed = initial_map(spec.num_experts, shard, ranks=over_experts.size, device=router_EH.device)
        columns_group = None if shard.experts_over_tp else groups.tp
        ranks = ExpertRanks(over_experts, placed, columns_group=columns_group)
    return MoeMlp(
        router_EH=router_EH,
        gate_up=parameters.experts(f"{name}.gate_up"),
        down=parameters.experts(f"{name}.down"),
        top_k=spec.top_k,
        normalize_top_k=spec.normalize_top_k,
        tp=groups.tp,
        ranks=ranks,
    )
