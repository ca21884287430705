"""What the layers of a tensor-parallel rank have in common: partial results are added up.

Shapes: T tokens, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...comm.collectives import Collectives
from ...comm.overlap import Parts


@dataclass(frozen=True, slots=True)
class Output:
    """What an attention or an MLP adds to the residual: this rank's part of a sum over ``group``, or without one all
    of it. Whoever gets it may overwrite it. ``end_norm_H``: what the sum is normalized with before it is added.

    Shapes: x_TH [tokens, hidden]; end_norm_H [hidden]
    """

    x_TH: Tensor
    group: Collectives | None = None
    end_norm_H: Tensor | None = None


def summed(x_TH: Tensor, group: Collectives | None) -> Parts:
    """Return the sum over the ranks of ``group``, or ``x`` without one; ``x`` is not to be used afterwards.

    Shapes: x_TH [tokens, hidden]
    """
    if group is None:
        return x_TH
    return (yield group.all_reduce(x_TH))
