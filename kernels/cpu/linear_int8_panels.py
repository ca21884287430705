"""The compiled product in 8-bit integers: the numbers of ``linear_int8``, laid out in panels.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .linear_panels import bias_address, panel_words, whole_panels
from .native import Native, native

_ZERO_POINT = 128  # the products of the machine take unsigned activations


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Panels:
    """A quantized weight.

    Shapes: words, see ``linear_panels``; scales_O float32 and corrections_O int32 of whole panels: what the zero point
    adds to each output's sum
    """

    words: Tensor
    scales_O: Tensor
    corrections_O: Tensor
    outputs: int
    inputs: int
    compiled: Native


def lay_int8_panels(integers_OI: Tensor, scales_O: Tensor) -> Int8Panels | None:
    """Return a quantized weight in panels; None where torch's product is the better one, or the only one.

    Shapes: integers_OI [outputs, inputs] int8; scales_O [outputs] float32
    """
    compiled = native()
    outputs, inputs = integers_OI.shape
    if compiled is None or not compiled.has_int8_panels or inputs % 4:
        return None
    corrections_O = integers_OI.sum(1, dtype=torch.int32) * _ZERO_POINT
    return Int8Panels(
        words=panel_words(integers_OI, compiled.lanes),
        scales_O=whole_panels(scales_O, compiled.lanes).contiguous(),
        corrections_O=whole_panels(corrections_O, compiled.lanes).contiguous(),
        outputs=outputs,
        inputs=inputs,
        compiled=compiled,
    )


def linear_int8_panels(x_TI: Tensor, weight: Int8Panels, bias_O: Tensor | None, *, wide: bool = False) -> Tensor:
    """Return ``x @ weight.T + bias``, both quantized; the result is of x's type or, if ``wide``, of float32.

    Shapes: x_TI [tokens, inputs] float32 or bfloat16; bias_O [outputs] of x's type, contiguous
    """
    if x_TI.stride(1) != 1:
        x_TI = x_TI.contiguous()
    rows, inputs = x_TI.shape
    assert inputs == weight.inputs and x_TI.dtype in (torch.bfloat16, torch.float32)
    threads, is_bfloat16 = torch.get_num_threads(), x_TI.dtype == torch.bfloat16
    unsigned_TI = x_TI.new_empty((rows, inputs), dtype=torch.uint8)
    row_scales_T = x_TI.new_empty(rows, dtype=torch.float32)
    product_TO = x_TI.new_empty((rows, weight.outputs), dtype=torch.float32 if wide else None)
    weight.compiled.quantize_rows(
        x_TI.data_ptr(),
        unsigned_TI.data_ptr(),
        row_scales_T.data_ptr(),
        rows,
        inputs,
        x_TI.stride(0),
        is_bfloat16,
        threads,
    )
    weight.compiled.linear_int8(
        unsigned_TI.data_ptr(),
        row_scales_T.data_ptr(),
        weight.words.data_ptr(),
        weight.scales_O.data_ptr(),
        weight.corrections_O.data_ptr(),
        bias_address(bias_O, x_TI, weight.outputs),
        product_TO.data_ptr(),
        rows,
        inputs,
        weight.outputs,
        is_bfloat16,
        wide,
        threads,
    )
    return product_TO
