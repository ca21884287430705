"""The compiled product with 4-bit weights: the numbers of ``linear_int4``, laid out in panels. It serves any number of
rows in one way, and keeps one copy of the weight.

A word of 16 bits holds the weights of inputs 0, 2, 4 and 6 behind its own, from the low bits up; the words of two
neighbouring inputs stand side by side, as pairs of bfloat16 numbers do in a product.

Shapes: T tokens, I inputs, O outputs, P panels, G groups, R runs of 8 inputs, V vectors, L lanes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .linear_panels import VECTORS, bias_address, whole_panels
from .native import Native, native

_RUNS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Panels:
    """A quantized weight.

    Shapes: words_PGRVL2 int16; scales_PGVL bfloat16
    """

    words_PGRVL2: Tensor
    scales_PGVL: Tensor
    outputs: int
    inputs: int
    compiled: Native


def lay_int4_panels(integers_OI: Tensor, scales_OG: Tensor) -> Int4Panels | None:
    """Return a quantized weight in panels; None where the compiled kernels do not have it.

    Shapes: integers_OI [outputs, inputs] 0 to 15, any integer type; scales_OG [outputs, groups] bfloat16
    """
    compiled = native()
    if compiled is None or not compiled.has_int4 or scales_OG.dtype != torch.bfloat16:
        return None
    groups = scales_OG.shape[1]
    words_OGRI2 = integers_OI.to(torch.int32).view(-1, groups, _RUNS, 4, 2)
    shifts_I1 = torch.arange(0, 16, 4, dtype=torch.int32).unsqueeze(-1)
    words_OGR2 = (words_OGRI2 << shifts_I1).sum(3, dtype=torch.int32).to(torch.int16)
    padded_OGR2 = whole_panels(words_OGR2, compiled.lanes)
    words_PVLGR2 = padded_OGR2.view(-1, VECTORS, compiled.lanes, groups, _RUNS, 2)
    scales_PVLG = whole_panels(scales_OG, compiled.lanes).reshape(-1, VECTORS, compiled.lanes, groups)
    return Int4Panels(
        words_PGRVL2=words_PVLGR2.permute(0, 3, 4, 1, 2, 5).contiguous(),
        scales_PGVL=scales_PVLG.permute(0, 3, 1, 2).contiguous(),
        outputs=integers_OI.shape[0],
        inputs=integers_OI.shape[1],
        compiled=compiled,
    )


def int4_integers(weight: Int4Panels) -> tuple[Tensor, Tensor]:
    """Return the integers [outputs, inputs] int32, 0 to 15, and the scales [outputs, groups] of a weight."""
    groups = weight.scales_PGVL.shape[1]
    words_OGR2 = weight.words_PGRVL2.permute(0, 3, 4, 1, 2, 5).reshape(-1, groups, _RUNS, 1, 2).to(torch.int32)
    shifts_I1 = torch.arange(0, 16, 4, dtype=torch.int32).unsqueeze(-1)
    integers_OI = ((words_OGR2 >> shifts_I1) & 15).reshape(-1, groups * _RUNS * 8)
    scales_OG = weight.scales_PGVL.permute(0, 2, 3, 1).reshape(-1, groups)
    return integers_OI[: weight.outputs], scales_OG[: weight.outputs]


def linear_int4_panels(x_TI: Tensor, weight: Int4Panels, bias_O: Tensor | None, *, wide: bool = False) -> Tensor:
    """Return ``x @ weight.T + bias``, of x's type or, if ``wide``, of float32.

    Shapes: x_TI [tokens, inputs] bfloat16; bias_O [outputs] bfloat16, contiguous
    """
    if x_TI.stride(1) != 1:
        x_TI = x_TI.contiguous()
    rows, inputs = x_TI.shape
    assert inputs == weight.inputs and x_TI.dtype == torch.bfloat16
    product_TO = x_TI.new_empty((rows, weight.outputs), dtype=torch.float32 if wide else None)
    weight.compiled.linear_int4(
        x_TI.data_ptr(),
        weight.words_PGRVL2.data_ptr(),
        weight.scales_PGVL.data_ptr(),
        bias_address(bias_O, x_TI, weight.outputs),
        product_TO.data_ptr(),
        rows,
        inputs,
        weight.outputs,
        x_TI.stride(0) * x_TI.itemsize,
        wide,
        torch.get_num_threads(),
    )
    return product_TO
