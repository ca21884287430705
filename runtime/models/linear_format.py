"""How the weights of linear layers are stored and multiplied: one format for each ``quantization``.

A format turns a weight, as it was read, into a ``Product`` that multiplies with it; the decoder knows no more. Formats
are chosen once, by device, type and option, and applied weight by weight while a checkpoint is read, so that the
weights never exist twice.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...kernels.backends import uses_triton_on
from ...kernels.cpu.linear_int4 import can_pack_int4, linear_int4, pack_int4
from ...kernels.cpu.linear_int8 import linear_int8, pack_int8
from ...kernels.cpu.linear_packed import can_pack, linear_packed, pack_weight
from ...kernels.linear import linear
from ...kernels.linear_fixed import fixed_linear
from ...sdk.errors import ConfigError
from .linear_format_gpu import gpu_format

Product = Callable[[Tensor, Tensor | None], Tensor]
"""Multiplies: (x_TI [tokens, inputs], bias_O [outputs] or None) → [tokens, outputs] of x's type."""


class LinearFormat(Protocol):
    """One way to store and multiply weights."""

    def prepare(self, weight_OI: Tensor, *, wide: bool = False) -> Product:
        """Take a weight [outputs, inputs]; afterwards the caller's copy may go.

        ``wide``: the product is float32, not rounded where that can be helped, for a sum that goes on.
        """
        ...

    def prepare_head(self, weight_OI: Tensor) -> Product:
        """Take the output head, in whose errors every token shares: never in fewer than 8 bits."""
        ...


@dataclass(frozen=True, slots=True)
class PlainProduct:
    """Multiplies with a weight as it is: whoever has a better way may take the weight.

    Shapes: weight_OI [outputs, inputs]
    """

    weight_OI: Tensor

    def __call__(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """Return [tokens, outputs]."""
        return linear(x_TI, self.weight_OI, bias_O)


@dataclass(frozen=True, slots=True)
class PlainFormat:
    """Weights as they are; any device."""

    def prepare(self, weight_OI: Tensor, *, wide: bool = False) -> Product:
        """Keep the weight."""
        if wide:
            return lambda x_TI, bias_O: linear(x_TI, weight_OI, bias_O).float()
        return PlainProduct(weight_OI)

    def prepare_head(self, weight_OI: Tensor) -> Product:
        """Keep the weight."""
        return self.prepare(weight_OI)


@dataclass(frozen=True, slots=True)
class FixedFormat:
    """Weights as they are, multiplied on a GPU in one way whatever the number of rows."""

    def prepare(self, weight_OI: Tensor, *, wide: bool = False) -> Product:
        """Keep the weight."""
        if wide:
            return lambda x_TI, bias_O: fixed_linear(x_TI, weight_OI, bias_O, leaves=1, dtype=torch.float32)
        return lambda x_TI, bias_O: fixed_linear(x_TI, weight_OI, bias_O)

    def prepare_head(self, weight_OI: Tensor) -> Product:
        """Keep the weight."""
        return self.prepare(weight_OI)


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """The same numbers in the layout that the CPU multiplies fastest."""

    def prepare(self, weight_OI: Tensor, *, wide: bool = False) -> Product:
        """Pack the weight."""
        packed = pack_weight(weight_OI)
        return lambda x_TI, bias_O: linear_packed(x_TI, packed, bias_O, wide=wide)

    def prepare_head(self, weight_OI: Tensor) -> Product:
        """Pack the weight."""
        return self.prepare(weight_OI)


@dataclass(frozen=True, slots=True)
class Int8Format:
    """Weights of 8 bits by output, activations of 8 bits by token."""

    def prepare(self, weight_OI: Tensor, *, wide: bool = False) -> Product:
        """Quantize the weight."""
        weight = pack_int8(weight_OI)
        return lambda x_TI, bias_O: linear_int8(x_TI, weight, bias_O, wide=wide)

    def prepare_head(self, weight_OI: Tensor) -> Product:
        """Quantize the weight."""
        return self.prepare(weight_OI)


@dataclass(frozen=True, slots=True)
class Int4Format:
    """Weights of 4 bits in groups; those whose shape does not allow it, and the head, of 8 bits.

    ``one_way``: one kernel for any number of rows.
    """

    one_way: bool = False

    def prepare(self, weight_OI: Tensor, *, wide: bool = False) -> Product:
        """Quantize the weight."""
        if not can_pack_int4(weight_OI):
            return Int8Format().prepare(weight_OI, wide=wide)
        weight = pack_int4(weight_OI)
        return lambda x_TI, bias_O: linear_int4(x_TI, weight, bias_O, one_way=self.one_way, wide=wide)

    def prepare_head(self, weight_OI: Tensor) -> Product:
        """Quantize the weight to 8 bits."""
        return Int8Format().prepare(weight_OI)


def choose_format(
    quantization: str, *, dtype: torch.dtype, device: torch.device, deterministic: bool = False
) -> LinearFormat:
    """Return the format for an option.

    Raises: ConfigError naming ``quantization`` when the device or the type cannot have it
    """
    if quantization == "none":
        if can_pack(dtype, device):
            return PackedFormat()
        return FixedFormat() if deterministic and device.type == "cuda" else PlainFormat()
    if device.type != "cpu" or uses_triton_on("linear_w8a8", device):
        return gpu_format(quantization, dtype=dtype, device=device, one_way=deterministic)
    if quantization == "fp8":
        raise ConfigError("quantization", "'fp8' is for GPUs, the device is cpu; use int8 or int4")
    if not can_pack(dtype, device):
        raise ConfigError("quantization", f"{quantization!r} needs float32 or bfloat16 on this CPU, got {dtype}")
    if quantization == "int4" and dtype != torch.bfloat16:
        # torch's kernel is a hundred times slower with float32 activations.
        raise ConfigError("quantization", f"'int4' needs dtype bfloat16, got {str(dtype).removeprefix('torch.')}")
    return Int8Format() if quantization == "int8" else Int4Format(one_way=deterministic)
