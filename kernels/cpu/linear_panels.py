"""Weights in panels, the layout of the compiled products, which serve any number of rows.

A panel has ``VECTORS`` vectors of outputs, side by side for each step through the inputs; a step is 4 bytes of a row:
one float32, two bfloat16 or four 8-bit integers. Each output adds up its inputs one after the other, so a row is the
same bits whatever rows stand beside it, and rows need not come in few sizes.

Shapes: T tokens, I inputs, O outputs, P panels, S steps, V vectors, L lanes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .native import Native, give_back_freed_memory, native

VECTORS = 4
_STEP_BYTES = 4
_LARGE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Panels:
    """A weight of float32 or bfloat16.

    Shapes: words_PSVL int32, the bits of the weights; outputs beyond the last one are zeros
    """

    words_PSVL: Tensor
    outputs: int
    inputs: int
    dtype: torch.dtype
    compiled: Native


def lay_panels(weight_OI: Tensor) -> Panels | None:
    """Return a weight in panels; None where torch's packed product is the better one, or the only one.

    Shapes: weight_OI [outputs, inputs] bfloat16 or float32 on the CPU
    """
    compiled = native()
    outputs, inputs = weight_OI.shape
    if compiled is None or not _is_fast(compiled, weight_OI.dtype) or inputs * weight_OI.itemsize % _STEP_BYTES:
        return None
    words_PSVL = panel_words(weight_OI, compiled.lanes)
    return Panels(words_PSVL=words_PSVL, outputs=outputs, inputs=inputs, dtype=weight_OI.dtype, compiled=compiled)


def takes_any_rows(dtype: torch.dtype) -> bool:
    """Whether products with weights of a type compute the rows that they are given; others fill them up to few sizes
    (``row_buckets``).
    """
    compiled = native()
    return compiled is not None and _is_fast(compiled, dtype)


def _is_fast(compiled: Native, dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return compiled.has_bfloat16_panels
    return dtype == torch.float32 and compiled.has_float32_panels


def panel_words(weight_OI: Tensor, lanes: int) -> Tensor:
    """Return the bits of a weight, whose inputs are whole steps, in panels.

    Shapes: returns [panels, steps, vectors, lanes] int32
    """
    if weight_OI.nbytes >= _LARGE_BYTES:
        give_back_freed_memory()
    words_OS = weight_OI.contiguous().view(torch.int32)
    outputs, steps = words_OS.shape
    panel = VECTORS * lanes
    words_PSVL = torch.empty((-(-outputs // panel), steps, VECTORS, lanes), dtype=torch.int32)
    # The last panel by itself: filling up the whole weight would take its memory once more.
    whole = outputs // panel
    words_PSVL[:whole] = words_OS[: whole * panel].view(-1, VECTORS, lanes, steps).permute(0, 3, 1, 2)
    if whole * panel < outputs:
        words_PSVL[whole] = whole_panels(words_OS[whole * panel :], lanes).view(VECTORS, lanes, steps).permute(2, 0, 1)
    return words_PSVL


def whole_panels(values_O: Tensor, lanes: int) -> Tensor:
    """Return values with zeros behind the last output, up to whole panels.

    Shapes: values_O [outputs, ...]
    """
    missing = -values_O.shape[0] % (VECTORS * lanes)
    if not missing:
        return values_O
    return torch.cat((values_O, values_O.new_zeros((missing, *values_O.shape[1:]))))


def linear_panels(x_TI: Tensor, weight: Panels, bias_O: Tensor | None = None, *, wide: bool = False) -> Tensor:
    """Return ``x @ weight.T + bias``, of x's type or, if ``wide``, of float32.

    Shapes: x_TI [tokens, inputs] of the weight's type; bias_O [outputs] contiguous
    """
    if x_TI.stride(1) != 1:
        x_TI = x_TI.contiguous()
    rows, inputs = x_TI.shape
    assert inputs == weight.inputs and x_TI.dtype == weight.dtype
    product_TO = x_TI.new_empty((rows, weight.outputs), dtype=torch.float32 if wide else None)
    weight.compiled.linear(
        x_TI.data_ptr(),
        weight.words_PSVL.data_ptr(),
        bias_address(bias_O, x_TI, weight.outputs),
        product_TO.data_ptr(),
        rows,
        inputs,
        weight.outputs,
        x_TI.stride(0) * x_TI.itemsize,
        x_TI.dtype == torch.bfloat16,
        wide,
        torch.get_num_threads(),
    )
    return product_TO


def bias_address(bias_O: Tensor | None, x_TI: Tensor, outputs: int) -> int | None:
    """Return where a bias, of x's type, stands in memory, None without one."""
    if bias_O is None:
        return None
    assert bias_O.dtype == x_TI.dtype and bias_O.shape == (outputs,) and bias_O.is_contiguous()
    return bias_O.data_ptr()
