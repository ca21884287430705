"""The MLPs of a layer: dense, and a mixture of experts.

Shapes: T tokens, H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...kernels.activation import silu_and_mul
from ...kernels.moe_gemm import moe_mlp
from ...kernels.moe_route import route
from .linear import Linear
from .linear_format import Product
from .model_spec import DenseMlpSpec, MoeSpec
from .parameters import Parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMlp:
    """A gated MLP; gate and up are one product."""

    gate_up: Linear
    down: Linear

    def __call__(self, x_TH: Tensor) -> Tensor:
        """Return [tokens, hidden size]."""
        return self.down(silu_and_mul(self.gate_up(x_TH)))


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeMlp:
    """A mixture of gated MLPs; gate and up of an expert are one product.

    Shapes: router_EH [experts, hidden] contiguous
    """

    router_EH: Tensor
    gate_up: tuple[Product, ...]
    down: tuple[Product, ...]
    top_k: int
    normalize_top_k: bool

    def __call__(self, x_TH: Tensor) -> Tensor:
        """Return [tokens, hidden size]."""
        weights_TA, experts_TA = route(x_TH, self.router_EH, top_k=self.top_k, normalize=self.normalize_top_k)
        return moe_mlp(x_TH, weights_TA, experts_TA, self.gate_up, self.down)


Mlp = DenseMlp | MoeMlp


def take_mlp(spec: DenseMlpSpec | MoeSpec, parameters: Parameters, name: str) -> Mlp:
    """Return the MLP called ``name``."""
    if isinstance(spec, DenseMlpSpec):
        return DenseMlp(gate_up=parameters.linear(f"{name}.gate_up"), down=parameters.linear(f"{name}.down"))
    return MoeMlp(
        router_EH=parameters.tensor(f"{name}.router"),
        gate_up=parameters.experts(f"{name}.gate_up"),
        down=parameters.experts(f"{name}.down"),
        top_k=spec.top_k,
        normalize_top_k=spec.normalize_top_k,
    )
