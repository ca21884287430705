"""Weights as MXFP4, as checkpoints have them: floats of 4 bits (e2m1), 32 inputs with a power of two in common.

Shapes: B blocks of inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
"""Inputs that share a scale."""

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_EXPONENT_BIAS = 127


def mxfp4_weight(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return what the numbers stand for. Of a byte, the lower half is the first of two inputs.

    Shapes: blocks [..., B, 16] uint8; scales [..., B] uint8; returns [..., B * 32] float32
    Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.3 and 5.4.1
    """
    values = torch.tensor((*_MAGNITUDES, *(-each for each in _MAGNITUDES)), device=blocks.device)
    halves = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    exponents = scales.to(torch.int32) - _EXPONENT_BIAS
    return torch.ldexp(values[halves.long()], exponents.unsqueeze(-1)).flatten(-2)
