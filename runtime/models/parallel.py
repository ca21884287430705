"""What the layers of a tensor-parallel rank have in common: partial results are added up.

Shapes: T tokens, H hidden size.
"""

from __future__ import annotations

from torch import Tensor

from ...comm.collectives import Collectives
from ...comm.overlap import Parts


def summed(x_TH: Tensor, group: Collectives | None) -> Parts:
    """Return the sum over the ranks of ``group``, or ``x`` without one; ``x`` is not to be used afterwards.

    Shapes: x_TH [tokens, hidden]
    """
    if group is None:
        return x_TH
    return (yield group.all_reduce(x_TH))
