"""RMSNorm's kernel against its reference, and the reference against a float64 formula."""

from __future__ import annotations

import pytest
import torch

from slipstream.kernels.norm import rms_norm, rms_norm_reference

EPSILON = 1e-6
CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("shape", [(3, 64), (1, 1), (0, 7), (5, 300), (2, 3, 80)])
def test_kernel_is_the_reference(shape: tuple[int, ...], dtype: torch.dtype, seed: int, launches: list[str]) -> None:
    torch.manual_seed(seed)
    x_TH, weight_H = torch.randn(shape, dtype=dtype), torch.randn(shape[1:], dtype=dtype)
    torch.testing.assert_close(
        rms_norm(x_TH, weight_H, EPSILON),
        rms_norm_reference(x_TH, weight_H, EPSILON),
        rtol=CLOSE[dtype],
        atol=CLOSE[dtype],
    )
    assert launches == (["_rms_norm_kernel"] if x_TH.numel() else [])
