"""The MLPs of a layer: dense, and a mixture of experts.

Shapes: T tokens, H hidden size, I intermediate size, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ...kernels.activation import silu_and_mul
from ...kernels.moe_gemm import moe_mlp
from ...kernels.moe_route import route
from .linear import Linear
from .model_spec import DenseMlpSpec, MoeSpec


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
    """A mixture of gated MLPs.

    Shapes: router_EH [experts, hidden]; gate_up_EIH [experts, 2 * intermediate, hidden], gate first; down_EHI
    [experts, hidden, intermediate]; all contiguous
    """

    router_EH: Tensor
    gate_up_EIH: Tensor
    down_EHI: Tensor
    top_k: int
    normalize_top_k: bool

    def __call__(self, x_TH: Tensor) -> Tensor:
        """Return [tokens, hidden size]."""
        weights_TA, experts_TA = route(x_TH, self.router_EH, top_k=self.top_k, normalize=self.normalize_top_k)
        return moe_mlp(x_TH, weights_TA, experts_TA, self.gate_up_EIH, self.down_EHI)


Mlp = DenseMlp | MoeMlp


def take_mlp(spec: DenseMlpSpec | MoeSpec, parameters: Mapping[str, Tensor], name: str) -> Mlp:
    """Return the MLP called ``name``."""
    if isinstance(spec, DenseMlpSpec):
        return DenseMlp(
            gate_up=Linear.take(parameters, f"{name}.gate_up"), down=Linear.take(parameters, f"{name}.down")
        )
    return MoeMlp(
        router_EH=parameters[f"{name}.router"],
        gate_up_EIH=parameters[f"{name}.gate_up"],
        down_EHI=parameters[f"{name}.down"],
        top_k=spec.top_k,
        normalize_top_k=spec.normalize_top_k,
    )
