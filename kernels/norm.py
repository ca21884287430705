"""Root-mean-square normalization, alone and with the residual addition before it.

Shapes: T tokens, H normalized size; a weight may have further axes that broadcast (one weight per head).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x_TH: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    """Normalize the last axis; the variance is taken in float32, the weight is multiplied after casting back.

    Shapes: x_TH [..., size] any float type; weight_H [size], or [heads, size] for x [tokens, heads, size]
    Source: RMSNorm (arXiv 1910.07467), equation 4
    """
    x32_TH = x_TH.float()
    variance_T1 = x32_TH.square().mean(-1, keepdim=True)
    return weight_H * (x32_TH * torch.rsqrt(variance_T1 + epsilon)).to(x_TH.dtype)


def add_rms_norm(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Add ``x`` to the residual and normalize the sum; return (normalized, new residual).

    Shapes: x_TH, residual_TH [tokens, size], same float type; weight_H [size]
    """
    residual_TH = residual_TH + x_TH
    return rms_norm(residual_TH, weight_H, epsilon), residual_TH
