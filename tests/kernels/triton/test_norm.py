"""RMSNorm's kernel against its reference, and the reference against a float64 formula."""

from __future__ import annotations

import pytest
import torch

from slipstream.kernels import backends
from slipstream.kernels.norm import (
    add_rms_norm,
    add_rms_norm_reference,
    normalize_heads_,
    rms_norm,
    rms_norm_reference,
)

EPSILON = 1e-6
CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    close = CLOSE[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("shape", [(3, 64), (1, 1), (0, 7), (5, 300), (2, 3, 80), (9, 2, 200)])
def test_kernel_is_the_reference(shape: tuple[int, ...], dtype: torch.dtype, seed: int, launches: list[str]) -> None:
    torch.manual_seed(seed)
    x_TH, weight_H = torch.randn(shape, dtype=dtype), torch.randn(shape[1:], dtype=dtype)
    expected = rms_norm_reference(x_TH, weight_H, EPSILON)
    assert_near(rms_norm(x_TH, weight_H, EPSILON), expected)
    assert launches == (["_rms_norm_kernel"] if x_TH.numel() else [])
    backends.use("auto")
    assert_near(rms_norm(x_TH, weight_H, EPSILON), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 64), (2, 1500), (9, 2, 200)])
def test_a_weight_of_float32(shape: tuple[int, ...], dtype: torch.dtype, seed: int, launches: list[str]) -> None:
    torch.manual_seed(seed)
    x_TH, weight_H = torch.randn(shape, dtype=dtype), torch.randn(shape[1:])
    # All in float32, rounded once: within half a unit of the last place.
    exact = rms_norm_reference(x_TH.float(), weight_H, EPSILON)
    assert torch.equal(rms_norm_reference(x_TH, weight_H, EPSILON), exact.to(dtype))
    found = rms_norm(x_TH, weight_H, EPSILON)
    # Small numbers of float16 have fewer digits.
    bound = 0.5001 * torch.finfo(dtype).eps * exact.abs() + (1e-7 if dtype == torch.float16 else 0)
    assert ((found.float() - exact).abs() <= bound).all()
    assert launches == (["_rms_norm_kernel"] if dtype == torch.bfloat16 else [])
    if x_TH.dim() == 2:
        normed_TH, total_TH = add_rms_norm(x_TH, x_TH.flip(0), weight_H, EPSILON)
        assert_near(normed_TH, rms_norm_reference(total_TH, weight_H, EPSILON))


def test_reference_is_the_formula(seed: int) -> None:
    torch.manual_seed(seed)
    x_TH, weight_H = torch.randn(5, 33, dtype=torch.float64), torch.randn(33, dtype=torch.float64)
    expected = weight_H * x_TH / ((x_TH**2).mean(1, keepdim=True) + EPSILON).sqrt()
    found = rms_norm_reference(x_TH.float(), weight_H.float(), EPSILON)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("shape", [(3, 64), (1, 1), (0, 7), (2, 1500)])
def test_sums_are_kept_and_normalized(
    shape: tuple[int, int], dtype: torch.dtype, seed: int, launches: list[str]
) -> None:
    torch.manual_seed(seed)
    x_TH, residual_TH, weight_H = (torch.randn(size, dtype=dtype) for size in (shape, shape, shape[1:]))
    normed_TH, total_TH = add_rms_norm(x_TH, residual_TH, weight_H, EPSILON)
    expected_TH, expected_total_TH = add_rms_norm_reference(x_TH, residual_TH, weight_H, EPSILON)
    assert torch.equal(total_TH, expected_total_TH)
    assert_near(normed_TH, expected_TH)
    assert launches == (["_rms_norm_kernel"] if x_TH.numel() else [])


def test_heads_are_normalized_where_they_are(seed: int, launches: list[str]) -> None:
    """Within a wider product, whose other heads are left alone."""
    torch.manual_seed(seed)
    wide_TSD, weight_SD = torch.randn(5, 7, 80), torch.randn(4, 80)
    expected = wide_TSD.clone()
    expected[:, 1:5] = rms_norm_reference(wide_TSD[:, 1:5], weight_SD, EPSILON)
    normalize_heads_(wide_TSD[:, 1:5], weight_SD, EPSILON)
    assert_near(wide_TSD, expected)
    assert torch.equal(wide_TSD[:, 5:], expected[:, 5:])
    assert launches == ["_rms_norm_kernel"]


@pytest.mark.parametrize("size", [80, 1100])
def test_a_row_is_the_same_in_any_batch(size: int, seed: int) -> None:
    torch.manual_seed(seed)
    x_TH, residual_TH = torch.randn(11, size).bfloat16(), torch.randn(11, size).bfloat16()
    weight_H = torch.randn(size).bfloat16()
    together, (with_residual, _) = rms_norm(x_TH, weight_H, 1e-5), add_rms_norm(x_TH, residual_TH, weight_H, 1e-5)
    for row in (0, 3, 10):
        alone = slice(row, row + 1)
        assert torch.equal(rms_norm(x_TH[alone], weight_H, 1e-5)[0], together[row])
        assert torch.equal(add_rms_norm(x_TH[alone], residual_TH[alone], weight_H, 1e-5)[0][0], with_residual[row])


def test_strides_and_sizes_that_the_kernel_does_not_take_are_done_by_torch(seed: int, launches: list[str]) -> None:
    torch.manual_seed(seed)
    for x_TH in (torch.randn(6, 4).T, torch.randn(1, 16385)):
        weight_H = torch.randn(x_TH.shape[1], dtype=x_TH.dtype)
        expected = rms_norm_reference(x_TH, weight_H, EPSILON)
        torch.testing.assert_close(rms_norm(x_TH, weight_H, EPSILON), expected, rtol=1e-5, atol=1e-5)
    assert launches == []
