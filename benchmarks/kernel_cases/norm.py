"""RMSNorm, with and without the residual addition: rows of decoding and of prefill."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from slipstream.kernels.norm import add_rms_norm, rms_norm, rms_norm_reference

from .case import KernelCase, by_torch

_EPSILON = 1e-6


def cases(device: torch.device) -> Iterator[KernelCase]:
    """Yield rows of hidden size 4,096 and 8,192."""
    is_gpu = device.type == "cuda"
    dtype = torch.bfloat16
    for rows, size in ((128, 4096), (8192, 4096), (8192, 8192)) if is_gpu else ((32, 2048), (512, 2048)):
        x_TH, residual_TH = (torch.randn(rows, size, dtype=dtype, device=device) for _ in range(2))
        weight_H = torch.randn(size, dtype=dtype, device=device)
        # Rows that stay in the cache of the launch before say more of latency than of bandwidth.
        wanted = 0.8 if rows > 1024 else None
        yield KernelCase(
            operation="rms_norm",
            shape=f"{rows} x {size}",
            dtype=dtype,
            run=partial(rms_norm, x_TH, weight_H, _EPSILON),
            bytes=2 * x_TH.nbytes,
            baselines={
                **by_torch(device, rms_norm_reference, x_TH, weight_H, _EPSILON),
                "torch": partial(torch.nn.functional.rms_norm, x_TH, weight_H.shape, weight_H, _EPSILON),
            },
            wanted=wanted,
        )
        yield KernelCase(
            operation="add_rms_norm",
            shape=f"{rows} x {size}",
            dtype=dtype,
            run=partial(add_rms_norm, x_TH, residual_TH, weight_H, _EPSILON),
            bytes=4 * x_TH.nbytes,
            baselines=by_torch(device, _add_rms_norm, x_TH, residual_TH, weight_H),
            wanted=wanted,
        )


def _add_rms_norm(x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor) -> object:
    total_TH = residual_TH + x_TH
    return rms_norm_reference(total_TH, weight_H, _EPSILON), total_TH
