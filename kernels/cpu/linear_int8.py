"""The matrix product in 8-bit integers: weights quantized once by output, activations by token as they come.

Each token has a scale of its own, and integers add up exactly: a token's result is the same bits whatever is in the
batch, however it is cut, and on any number of threads.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .linear_int8_panels import Int8Panels, lay_int8_panels, linear_int8_panels
from .row_buckets import in_buckets

_LARGEST = 127.0
_ZERO_POINT = 128  # oneDNN is fast with unsigned activations alone
_SMALLEST_SCALE = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Weight:
    """A quantized weight, as oneDNN multiplies with it.

    Shapes: packed, [outputs, inputs] int8 in oneDNN's layout; scales_O, [outputs] float32
    """

    packed: Tensor
    scales_O: Tensor
    zero_points_O: Tensor


def quantize_rows(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix as integers of -127 to 127, in float32, and the scale of each row.

    Shapes: x_TI [rows, inputs] any float type; returns [rows, inputs], [rows, 1] float32
    """
    x32_TI = x_TI.float()
    scales_T1 = x32_TI.abs().amax(1, keepdim=True).div_(_LARGEST).clamp_min_(_SMALLEST_SCALE)
    return torch.div(x32_TI, scales_T1).round_(), scales_T1


def pack_int8(weight_OI: Tensor) -> Int8Weight | Int8Panels:
    """Quantize a weight, each output with a scale of its own.

    Shapes: weight_OI [outputs, inputs] any float type, on the CPU
    Source: symmetric per-channel quantization (arXiv 2004.09602, sections 3.2 and 4.1)
    """
    integers_OI, scales_O1 = quantize_rows(weight_OI)
    outputs = weight_OI.shape[0]
    panels = lay_int8_panels(integers_OI.to(torch.int8), scales_O1.view(outputs))
    if panels is not None:
        return panels
    return Int8Weight(
        packed=torch.ops.onednn.qlinear_prepack(integers_OI.to(torch.int8), None),
        scales_O=scales_O1.view(outputs),
        zero_points_O=torch.zeros(outputs, dtype=torch.int64),
    )


def linear_int8(
    x_TI: Tensor, weight: Int8Weight | Int8Panels, bias_O: Tensor | None = None, *, wide: bool = False
) -> Tensor:
    """Return ``x @ weight.T + bias``, both quantized; the result is of x's type or, if ``wide``, of float32.

    Shapes: x_TI [tokens, inputs] float32 or bfloat16; bias_O [outputs]
    Source: dynamic quantization by token (ZeroQuant, arXiv 2206.01861, section 3.1)
    """
    if isinstance(weight, Int8Panels):
        return linear_int8_panels(x_TI, weight, bias_O, wide=wide)
    integers_TI, scales_T1 = quantize_rows(x_TI)
    unsigned_TI = integers_TI.add_(_ZERO_POINT).to(torch.uint8)
    product_TO = in_buckets(unsigned_TI, lambda rows_TI: _multiply(rows_TI, weight))
    product_TO.mul_(scales_T1)
    if bias_O is not None:
        product_TO.add_(bias_O)
    return product_TO if wide else product_TO.to(x_TI.dtype)


def _multiply(unsigned_TI: Tensor, weight: Int8Weight) -> Tensor:
    product_TO: Tensor = torch.ops.onednn.qlinear_pointwise(
        unsigned_TI,
        1.0,  # a scale for all tokens would tie them together: each has its own, below
        _ZERO_POINT,
        weight.packed,
        weight.scales_O,
        weight.zero_points_O,
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
    return product_TO
