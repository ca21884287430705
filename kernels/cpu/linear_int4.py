"""The matrix product with 4-bit weights: groups of inputs share a scale, activations stay as they are.

Reading is what a small batch waits for, and 4-bit weights are read four times as fast as 16-bit ones. Few rows go
through a kernel that unpacks weights as it multiplies, a row being the same bits whatever rows stand beside it; many
rows are bound by arithmetic, so the weight is unpacked for them, a slice of outputs at a time.

Shapes: T tokens, I inputs, O outputs, G groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as functional
from torch import Tensor

from .linear_int4_panels import Int4Panels, int4_integers, lay_int4_panels, linear_int4_panels
from .row_buckets import in_buckets

GROUP = 32
MANY_ROWS = 96
"""Rows from which unpacking the weight first is faster, measured."""
_OFFSET = 8
_LARGEST = 7.0
_SLICE_ELEMENTS = 1 << 20  # unpacked at a time: stays in cache until it is multiplied


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Weight:
    """A quantized weight, in the layout of torch's kernel and, for many rows, as pairs of numbers in a byte.

    Shapes: packed, opaque; scales_GO2 [groups, outputs, 2], scale and zero; pairs_OI [outputs, inputs / 2] uint8, the
    first half of each group's inputs in the low bits
    """

    packed: Tensor
    scales_GO2: Tensor
    pairs_OI: Tensor


def can_pack_int4(weight_OI: Tensor) -> bool:
    """Return whether a weight has whole groups, and outputs that the kernel takes."""
    outputs, inputs = weight_OI.shape
    return inputs % GROUP == 0 and outputs % 16 == 0


def pack_int4(weight_OI: Tensor) -> Int4Weight | Int4Panels:
    """Quantize a weight, groups of ``GROUP`` inputs of an output sharing a scale.

    Shapes: weight_OI [outputs, inputs] bfloat16, on the CPU (float32 works, and is slow to multiply with)
    Source: group-wise round to nearest (as the baseline of GPTQ, arXiv 2210.17323, section 4)
    """
    outputs, inputs = weight_OI.shape
    groups_OGI = weight_OI.float().view(outputs, inputs // GROUP, GROUP)
    # The scale has the type that it is multiplied in, so that unpacking is exact.
    scales_OG1 = (groups_OGI.abs().amax(-1, keepdim=True) / _LARGEST).clamp_min(1e-8).to(weight_OI.dtype)
    integers_OGI = (groups_OGI / scales_OG1.float()).round_().clamp_(-_OFFSET, _LARGEST).to(torch.int32).add_(_OFFSET)
    scales_OG = scales_OG1.squeeze(-1)
    panels = lay_int4_panels(integers_OGI.view(outputs, inputs), scales_OG)
    if panels is not None:
        return panels
    low, high = integers_OGI.to(torch.uint8).chunk(2, dim=-1)
    return Int4Weight(
        packed=torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers_OGI.view(outputs, inputs), 1),
        scales_GO2=torch.stack((scales_OG, torch.zeros_like(scales_OG)), -1).transpose(0, 1).contiguous(),
        pairs_OI=(low | (high << 4)).view(outputs, inputs // 2),
    )


def unpack_int4(weight: Int4Weight | Int4Panels, first: int, last: int) -> Tensor:
    """Return rows ``first`` to ``last`` of a quantized weight as numbers of its scales' type.

    Shapes: returns [last - first, inputs]
    """
    if isinstance(weight, Int4Panels):
        integers_OI, scales_OG = (part[first:last] for part in int4_integers(weight))
        groups_OGI = integers_OI.to(scales_OG.dtype).sub_(_OFFSET).view(last - first, -1, GROUP)
        return groups_OGI.mul_(scales_OG.unsqueeze(-1)).view(last - first, -1)
    pairs = weight.pairs_OI[first:last].view(last - first, -1, GROUP // 2)
    integers = torch.cat((pairs & 15, pairs >> 4), dim=-1).to(weight.scales_GO2.dtype)
    scales_OG1 = weight.scales_GO2[:, first:last, 0].transpose(0, 1).unsqueeze(-1)
    return integers.sub_(_OFFSET).mul_(scales_OG1).view(last - first, -1)


def linear_int4(
    x_TI: Tensor,
    weight: Int4Weight | Int4Panels,
    bias_O: Tensor | None = None,
    *,
    one_way: bool = False,
    wide: bool = False,
) -> Tensor:
    """Return ``x @ weight.T + bias``.

    ``one_way``: the same kernel for any number of rows, so that a row's bits never depend on how many there are.
    ``wide``: as float32, for a sum that goes on. torch's kernel gives x's type: without compiled ones it was rounded.

    Shapes: x_TI [tokens, inputs] of the scales' type; bias_O [outputs]
    """
    if isinstance(weight, Int4Panels):
        return linear_int4_panels(x_TI, weight, bias_O, wide=wide)
    if wide:
        return linear_int4(x_TI, weight, bias_O, one_way=one_way).float()
    if one_way or x_TI.shape[0] < MANY_ROWS:
        product_TO: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_TI.contiguous(), weight.packed, GROUP, weight.scales_GO2
        )
        return product_TO if bias_O is None else product_TO.add_(bias_O)
    outputs = weight.pairs_OI.shape[0]
    product_TO = x_TI.new_empty((x_TI.shape[0], outputs))
    at_once = max(1, _SLICE_ELEMENTS // x_TI.shape[1])
    for first in range(0, outputs, at_once):
        last = min(outputs, first + at_once)
        bias = None if bias_O is None else bias_O[first:last]
        multiply = partial(functional.linear, weight=unpack_int4(weight, first, last), bias=bias)
        product_TO[:, first:last] = in_buckets(x_TI, multiply)
    return product_TO
