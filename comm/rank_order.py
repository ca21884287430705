"""Reduction in the order of ranks.

Every rank, every size of tensor and every place in it adds in the same order. So all ranks get the same bits, and what
a token's row adds up to does not depend on the rows beside it, as it would where each part of a ring starts elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_HALVES = (torch.bfloat16, torch.float16)

_SLICE = 16384
"""Numbers added at a time: they stay in the cache, and torch adds so few without starting threads."""


def reduce_in_rank_order(parts: Sequence[Tensor], op: str, out: Tensor) -> Tensor:
    """Reduce the ranks' tensors, rank 0's first, into ``out``, which may be one of them; 16-bit floats round once.

    Shapes: parts and out of one shape and type, contiguous
    """
    if out.numel() <= _SLICE:
        _reduce(parts, op, out)
        return out
    flat, flat_out = [part.view(-1) for part in parts], out.view(-1)
    for start in range(0, out.numel(), _SLICE):
        _reduce([part[start : start + _SLICE] for part in flat], op, flat_out[start : start + _SLICE])
    return out


def _reduce(parts: Sequence[Tensor], op: str, out: Tensor) -> None:
    first, *others = parts
    if not others:
        if out is not first:
            out.copy_(first)
        return
    combine = torch.add if op == "sum" else torch.maximum
    if len(parts) == 2:
        combine(first, others[0], out=out)
        return
    total = combine(first.float(), others[0]) if first.dtype in _HALVES else combine(first, others[0])
    for other in others[1:]:
        combine(total, other, out=total)
    out.copy_(total)
