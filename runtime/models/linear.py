"""A linear layer: a weight and perhaps a bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ...kernels.linear import linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """Shapes: weight_OI [outputs, inputs] contiguous; bias_O [outputs]."""

    weight_OI: Tensor
    bias_O: Tensor | None

    @classmethod
    def take(cls, parameters: Mapping[str, Tensor], name: str) -> Linear:
        """Return the layer called ``name``; it has a bias if the parameters have one."""
        return cls(weight_OI=parameters[f"{name}.weight"], bias_O=parameters.get(f"{name}.bias"))

    def __call__(self, x_TI: Tensor) -> Tensor:
        """Return [tokens, outputs]."""
        return linear(x_TI, self.weight_OI, self.bias_O)
