"""The matrix product with weights that were laid out for the CPU once, when they were loaded.

oneDNN would otherwise bring the weights into its own layout at every call, which costs more than reading them.
One packed copy serves every number of rows. Where compiled kernels multiply as fast, weights are laid out for them
instead (``linear_panels``). Every row is the same bits whatever rows stand beside it: over long sums a
single row is multiplied as two, because oneDNN then has another kernel for one row, which adds up in another order.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linear_panels import Panels, lay_panels, linear_panels
from .row_buckets import in_buckets

PackedWeight = Tensor | Panels

_ROWS_HINT = 8
"""The rows that the layout is made for. 8 is good from 1 to 512; 1 is bad above one row, 512 below five."""
_LONGEST_PLAIN_SUM = 1024
"""Inputs up to which one row alone adds up as it does among others."""


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether weights of a type can be packed for a device."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def pack_weight(weight_OI: Tensor) -> PackedWeight:
    """Return a weight in the layout for ``linear_packed``: opaque, of the same size.

    Shapes: weight_OI [outputs, inputs] bfloat16 or float32 on the CPU
    """
    panels = lay_panels(weight_OI)
    if panels is not None:
        return panels
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), _ROWS_HINT)
    return packed


def linear_packed(
    x_TI: Tensor, packed_weight: PackedWeight, bias_O: Tensor | None = None, *, wide: bool = False
) -> Tensor:
    """Return ``x @ weight.T + bias``.

    ``wide``: as float32, for a sum that goes on. oneDNN gives x's type and no other, so there it has been rounded.

    Shapes: x_TI [tokens, inputs] of the weight's type; packed_weight from ``pack_weight``; bias_O [outputs]
    """
    if isinstance(packed_weight, Panels):
        return linear_panels(x_TI, packed_weight, bias_O, wide=wide)
    if wide:
        return linear_packed(x_TI.contiguous(), packed_weight, bias_O).float()
    if x_TI.shape[0] == 1 and x_TI.shape[1] > _LONGEST_PLAIN_SUM:
        return _multiply(x_TI.expand(2, -1).contiguous(), packed_weight, bias_O)[:1]
    return in_buckets(x_TI, lambda rows_TI: _multiply(rows_TI, packed_weight, bias_O))


def _multiply(x_TI: Tensor, packed_weight: Tensor, bias_O: Tensor | None) -> Tensor:
    product_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, packed_weight, bias_O, "none", [], "")
    return product_TO
