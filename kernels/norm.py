"""Root-mean-square normalization, alone and with the residual addition before it.

Shapes: T tokens, H normalized size; a weight may have further axes that broadcast (one weight per head).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def rms_norm(x_TH: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    """Normalize the last axis; the variance is taken in float32, the weight is multiplied after casting back.

    Shapes: x_TH [..., size] any float type; weight_H [size], or [heads, size] for x [tokens, heads, size]
    Source: RMSNorm (arXiv 1910.07467), equation 4
    """
    # The norm reads x once and leaves no squares; addcmul makes the variance of it and adds epsilon.
    norm_T1 = torch.linalg.vector_norm(x_TH, dim=-1, keepdim=True, dtype=torch.float32)
    scale_T1 = torch.addcmul(_scalar(epsilon, x_TH.device), norm_T1, norm_T1, value=1 / x_TH.shape[-1]).rsqrt_()
    # A product with float32 is float32.
    return (x_TH * scale_T1).to(x_TH.dtype).mul_(weight_H)


@lru_cache(maxsize=64)
def _scalar(value: float, device: torch.device) -> Tensor:
    # Made once: with few tokens, an operation takes as long as its call.
    with torch.inference_mode(mode=False):
        return torch.full((), value, dtype=torch.float32, device=device)


def add_rms_norm(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Add ``x`` to the residual and normalize the sum; return (normalized, new residual).

    Shapes: x_TH, residual_TH [tokens, size], same float type; weight_H [size]
    """
    residual_TH = residual_TH + x_TH
    return rms_norm(residual_TH, weight_H, epsilon), residual_TH
