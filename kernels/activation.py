"""The gated activation of every MLP here.

Shapes: T tokens, I intermediate size.
"""

from __future__ import annotations

import torch.nn.functional as functional
from torch import Tensor


def silu_and_mul(gate_up_TI: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` for gate and up side by side.

    A row's bits do not depend on other rows if ``size`` is a multiple of 32 times the threads: torch rounds
    values at the ragged end of a thread's share (which may lie within a row) in another way than the others.

    Shapes: gate_up_TI [tokens, 2 * size], gate first; returns [tokens, size]
    Source: SwiGLU (arXiv 2002.05202), section 2
    """
    gate_TI, up_TI = gate_up_TI.chunk(2, dim=-1)
    return functional.silu(gate_TI).mul_(up_TI)
