"""Reduction in the order of ranks.

Every rank, every size of tensor and every place in it adds in the same order. So all ranks get the same bits, and what
a token's row adds up to does not depend on the rows beside it, as it would where each part of a ring starts elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_HALVES = (torch.bfloat16, torch.float16)


def reduce_in_rank_order(parts: Sequence[Tensor], op: str, out: Tensor) -> Tensor:
    """Reduce the ranks' tensors, rank 0's first, into ``out``, which may be one of them; 16-bit floats round once.

    Shapes: parts and out of one shape and type
    """
    first, *others = parts
    if not others:
        return out.copy_(first) if out is not first else out
    combine = torch.add if op == "sum" else torch.maximum
    if len(parts) == 2:
        combine(first, others[0], out=out)
        return out
    total = combine(first.float(), others[0]) if first.dtype in _HALVES else combine(first, others[0])
    for other in others[1:]:
        combine(total, other, out=total)
    return out.copy_(total)
