"""The gated activation of every MLP here.

Shapes: T tokens, I intermediate size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from .cpu.native import native_for


def silu_and_mul(gate_up_TI: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` for gate and up side by side.

    A row's bits do not depend on other rows with compiled kernels, and without them if ``size`` is a multiple of 32
    times the threads: torch rounds values at the ragged end of a thread's share (which may lie within a row) in
    another way than the others.

    Shapes: gate_up_TI [..., 2 * size], gate first; returns [..., size]
    Source: SwiGLU (arXiv 2002.05202), section 2
    """
    compiled = native_for(gate_up_TI)
    if compiled is not None and gate_up_TI.is_contiguous():
        size = gate_up_TI.shape[-1] // 2
        out_TI = gate_up_TI.new_empty((*gate_up_TI.shape[:-1], size))
        rows, is_bfloat16 = out_TI.numel() // max(size, 1), gate_up_TI.dtype == torch.bfloat16
        compiled.silu_and_mul(
            gate_up_TI.data_ptr(), out_TI.data_ptr(), rows, size, is_bfloat16, torch.get_num_threads()
        )
        return out_TI
    gate_TI, up_TI = gate_up_TI.chunk(2, dim=-1)
    return functional.silu(gate_TI).mul_(up_TI)
