"""Root-mean-square normalization, alone and with the residual addition before it.

Shapes: T tokens, H normalized size; a weight may have further axes that broadcast (one weight per head).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .native import Native, native_for


def rms_norm(x_TH: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    """Normalize the last axis; the variance is taken in float32, the weight is multiplied after casting back.

    Shapes: x_TH [..., size] any float type; weight_H [size], or [heads, size] for x [tokens, heads, size]
    Source: RMSNorm (arXiv 1910.07467), equation 4
    """
    compiled = native_for(x_TH)
    if compiled is not None and x_TH.dim() in (2, 3) and x_TH.stride(-1) == 1 and _is_weight(weight_H, x_TH):
        heads = x_TH.shape[1] if x_TH.dim() == 3 else 1
        if heads == 1 or x_TH.stride(1) == x_TH.shape[-1]:
            out_TH = x_TH.new_empty(x_TH.shape)
            _normalize(compiled, x_TH, None, weight_H, None, out_TH, epsilon)
            return out_TH
    # The norm reads x once and leaves no squares; addcmul makes the variance of it and adds epsilon.
    norm_T1 = torch.linalg.vector_norm(x_TH, dim=-1, keepdim=True, dtype=torch.float32)
    scale_T1 = torch.addcmul(_scalar(epsilon, x_TH.device), norm_T1, norm_T1, value=1 / x_TH.shape[-1]).rsqrt_()
    # A product with float32 is float32.
    return (x_TH * scale_T1).to(x_TH.dtype).mul_(weight_H)


def normalize_heads_(x_THD: Tensor, weight_HD: Tensor, epsilon: float) -> None:
    """As ``rms_norm``, in place.

    Shapes: x_THD [tokens, heads, size], heads side by side; weight_HD [heads, size]
    """
    compiled = native_for(x_THD)
    if compiled is not None and x_THD.stride(1) == x_THD.shape[-1] and _is_weight(weight_HD, x_THD):
        _normalize(compiled, x_THD, None, weight_HD, None, x_THD, epsilon)
    else:
        x_THD.copy_(rms_norm(x_THD, weight_HD, epsilon))


def _is_weight(weight_H: Tensor, x_TH: Tensor) -> bool:
    """Return whether the compiled norm takes a weight: it trusts what it is given."""
    shapes = (x_TH.shape[-1:], x_TH.shape[1:])
    return weight_H.dtype == x_TH.dtype and weight_H.is_contiguous() and weight_H.shape in shapes


def _normalize(
    compiled: Native,
    x_TH: Tensor,
    residual_TH: Tensor | None,
    weight_H: Tensor,
    total_TH: Tensor | None,
    out_TH: Tensor,
    epsilon: float,
) -> None:
    size = x_TH.shape[-1]
    compiled.rms_norm(
        x_TH.data_ptr(),
        None if residual_TH is None else residual_TH.data_ptr(),
        weight_H.data_ptr(),
        None if total_TH is None else total_TH.data_ptr(),
        out_TH.data_ptr(),
        x_TH.shape[0],
        x_TH.shape[1] if x_TH.dim() == 3 else 1,
        size,
        x_TH.stride(0),
        out_TH.stride(0),
        size if weight_H.dim() == 2 else 0,
        epsilon,
        x_TH.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )


@lru_cache(maxsize=64)
def _scalar(value: float, device: torch.device) -> Tensor:
    # Made once: with few tokens, an operation takes as long as its call.
    with torch.inference_mode(mode=False):
        return torch.full((), value, dtype=torch.float32, device=device)


def add_rms_norm(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Add ``x`` to the residual and normalize the sum; return (normalized, new residual).

    Shapes: x_TH, residual_TH [tokens, size], same float type; weight_H [size]
    """
    compiled = native_for(x_TH)
    is_plain = x_TH.dim() == 2 and x_TH.is_contiguous() and residual_TH.is_contiguous()
    are_alike = x_TH.shape == residual_TH.shape and x_TH.dtype == residual_TH.dtype
    if compiled is not None and is_plain and are_alike and weight_H.dim() == 1 and _is_weight(weight_H, x_TH):
        total_TH, out_TH = torch.empty_like(x_TH), torch.empty_like(x_TH)
        _normalize(compiled, x_TH, residual_TH, weight_H, total_TH, out_TH, epsilon)
        return out_TH, total_TH
    residual_TH = residual_TH + x_TH
    return rms_norm(residual_TH, weight_H, epsilon), residual_TH
