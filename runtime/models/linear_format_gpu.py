"""Formats of weights for GPUs: integers of 4 and 8 bits, float8; and the codes that quantized checkpoints have.

Chosen in ``linear_format``; the same interface as the formats there.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.backends import uses_triton_on
from ...kernels.float8_codes import Float8Codes
from ...kernels.int4_codes import Int4Codes, can_quantize_int4, quantize_int4
from ...kernels.linear_w4a16 import linear_w4a16, pack_int4_matrix
from ...kernels.linear_w8a8 import ByteMatrix, linear_w8a8, linear_w8a8_rows, pack_byte_matrix, quantize_matrix
from ...kernels.quantize_rows import ByteRows
from ...sdk.errors import ConfigError

_Product = Callable[[Tensor, Tensor | None], Tensor]

INT4_GROUP = 32
"""Inputs that share a scale: as on a CPU, so that a weight is the same integers everywhere."""
_FLOAT8_CAPABILITY = (8, 9)


@dataclass(frozen=True, slots=True)
class ByteProduct:
    """Multiplies with 8-bit numbers, activations by token; also with those that are quantized already."""

    matrix: ByteMatrix
    one_way: bool
    wide: bool

    def __call__(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """Return [tokens, outputs]."""
        return linear_w8a8(x_TI, self.matrix, bias_O, one_way=self.one_way, wide=self.wide)

    @property
    def takes(self) -> torch.dtype:
        """The type of 8-bit numbers that it multiplies with."""
        return self.matrix.values_OI.dtype

    def of_rows(self, rows: ByteRows, bias_O: Tensor | None) -> Tensor:
        """Return the same of rows that are quantized already: the same bits."""
        dtype = torch.float32 if self.wide else rows.dtype
        return linear_w8a8_rows(rows.values_TH, rows.scales_T1, self.matrix, bias_O, dtype=dtype, one_way=self.one_way)


@dataclass(frozen=True, slots=True)
class ByteFormat:
    """Weights of 8 bits by output, activations of the same type by token: int8 or float8_e4m3fn.

    ``one_way``: one arithmetic for any number of rows.
    """

    dtype: torch.dtype
    one_way: bool = False

    def prepare(self, weight_OI: Tensor, *, wide: bool = False) -> _Product:
        """Quantize the weight; as ``LinearFormat.prepare``."""
        return self.product(quantize_matrix(weight_OI, self.dtype), wide=wide)

    def prepare_head(self, weight_OI: Tensor) -> _Product:
        """Quantize the weight."""
        return self.prepare(weight_OI)

    def product(self, matrix: ByteMatrix, *, wide: bool = False) -> ByteProduct:
        """Return what multiplies with a matrix."""
        return ByteProduct(matrix, self.one_way, wide)


@dataclass(frozen=True, slots=True)
class WordFormat:
    """Weights of 4 bits in groups, activations as they are; those without whole groups, and the head, of 8 bits."""

    one_way: bool = False

    def prepare(self, weight_OI: Tensor, *, wide: bool = False) -> _Product:
        """Quantize the weight; as ``LinearFormat.prepare``."""
        if not can_quantize_int4(weight_OI, INT4_GROUP):
            return ByteFormat(torch.int8, one_way=self.one_way).prepare(weight_OI, wide=wide)
        return self.product(quantize_int4(weight_OI, group=INT4_GROUP), wide=wide)

    def prepare_head(self, weight_OI: Tensor) -> _Product:
        """Quantize the weight to 8 bits."""
        return ByteFormat(torch.int8, one_way=self.one_way).prepare(weight_OI)

    def product(self, codes: Int4Codes, *, wide: bool = False) -> _Product:
        """Return what multiplies with a weight that is quantized already."""
        matrix = pack_int4_matrix(codes)
        return lambda x_TI, bias_O: linear_w4a16(x_TI, matrix, bias_O, one_way=self.one_way, wide=wide)


def gpu_format(
    quantization: str, *, dtype: torch.dtype, device: torch.device, one_way: bool
) -> ByteFormat | WordFormat:
    """Return the format for an option. Raises: ConfigError when the GPU or the type cannot have it"""
    if quantization == "int4":
        if dtype == torch.float32:
            raise ConfigError("quantization", "'int4' needs dtype bfloat16 or float16 on a GPU, got float32")
        return WordFormat(one_way=one_way)
    if quantization == "fp8":
        if not has_float8(device):
            raise ConfigError("quantization", f"'fp8' needs a GPU with float8 products (sm_89 or later), not {device}")
        return ByteFormat(torch.float8_e4m3fn, one_way=one_way)
    return ByteFormat(torch.int8, one_way=one_way)


def has_float8(device: torch.device) -> bool:
    """Return whether a device multiplies float8 numbers of NVIDIA's kind; the interpreter does."""
    if device.type != "cuda":
        return True
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= _FLOAT8_CAPABILITY


def kept_product(codes: Int4Codes | Float8Codes, *, device: torch.device, one_way: bool) -> _Product | None:
    """Return what multiplies with a checkpoint's codes as they are, on a GPU; None where no kernel takes them.

    Float8 numbers with scales by block have none: they become plain numbers.
    """
    if isinstance(codes, Int4Codes):
        if not uses_triton_on("linear_w4a16", device):
            return None
        try:
            return WordFormat(one_way=one_way).product(codes.to(device))
        except ValueError:  # groups that the kernel does not take
            return None
    if not (codes.has_one_scale and uses_triton_on("linear_w8a8", device) and has_float8(device)):
        return None
    moved = codes.to(device)
    return ByteFormat(torch.float8_e4m3fn, one_way=one_way).product(
        pack_byte_matrix(moved.values_OI, moved.scales_OB.view(-1))
    )
