"""Rows as 8-bit numbers: alone, behind a norm, behind the activation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slipstream.kernels import backends
from slipstream.kernels.activation import silu_and_mul_quantized, silu_and_mul_quantized_reference
from slipstream.kernels.norm_quantized import (
    add_rms_norm_quantized,
    add_rms_norm_quantized_reference,
    rms_norm_quantized,
    rms_norm_quantized_reference,
)
from slipstream.kernels.quantize_rows import quantize_rows, quantize_rows_reference

INT8, FLOAT8 = torch.int8, torch.float8_e4m3fn
SHAPES = [(3, 64), (1, 1), (0, 7), (2, 1500), (4, 33)]


def assert_near(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Numbers may fall on the other side of a tie where what is quantized differs in its last bit."""
    torch.testing.assert_close(found[1], expected[1], rtol=1e-2, atol=0)
    assert found[0].dtype == expected[0].dtype
    numbers, others = found[0].float(), expected[0].float()
    # One integer, or one step of float8's three bits.
    step = 1.0 if found[0].dtype == INT8 else others.abs().clamp_min(2**-6) / 8
    assert bool(((numbers - others).abs() <= step).all())


@pytest.mark.parametrize("dtype", [INT8, FLOAT8])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_the_reference(
    shape: tuple[int, int], x_dtype: torch.dtype, dtype: torch.dtype, seed: int, launches: list[str]
) -> None:
    torch.manual_seed(seed)
    x_TH = torch.randn(shape, dtype=x_dtype)
    if len(x_TH) > 1:
        x_TH[1] = 0
    numbers_TH, scales_T1 = quantize_rows(x_TH, dtype)
    expected_TH, expected_scales_T1 = quantize_rows_reference(x_TH, dtype)
    assert torch.equal(scales_T1, expected_scales_T1)
    assert torch.equal(numbers_TH.view(torch.uint8), expected_TH.view(torch.uint8))
    assert launches == (["_quantize_rows_kernel"] if len(x_TH) and x_dtype != torch.float32 else [])


@pytest.mark.parametrize(("dtype", "error"), [(INT8, 0.5 / 127), (FLOAT8, 1 / 16)])
def test_reference_is_near_what_it_quantizes(dtype: torch.dtype, error: float, seed: int) -> None:
    torch.manual_seed(seed)
    x_TH = torch.randn(9, 200)
    numbers_TH, scales_T1 = quantize_rows_reference(x_TH, dtype)
    highest_T1 = x_TH.abs().amax(1, keepdim=True)
    assert bool(((numbers_TH.float() * scales_T1 - x_TH).abs() <= error * 1.001 * highest_T1).all())
    assert torch.equal(numbers_TH.float().abs().amax(1), torch.full((9,), 127.0 if dtype == INT8 else 448.0))


@pytest.mark.parametrize("dtype", [INT8, FLOAT8])
def test_what_is_no_number_is_found_in_the_scale(dtype: torch.dtype) -> None:
    x_TH = torch.ones(3, 40, dtype=torch.bfloat16)
    x_TH[1, 7] = float("nan")
    for way in (quantize_rows, quantize_rows_reference):
        assert way(x_TH, dtype)[1].isnan().flatten().tolist() == [False, True, False]
    gate_up_TI = torch.ones(2, 80)
    gate_up_TI[1, 50] = float("nan")
    assert silu_and_mul_quantized(gate_up_TI, dtype)[1].isnan().flatten().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [INT8, FLOAT8])
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_are_quantized(shape: tuple[int, int], x_dtype: torch.dtype, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x_TH, residual_TH, weight_H = (torch.randn(size, dtype=x_dtype) for size in (shape, shape, shape[1:]))
    expected = rms_norm_quantized_reference(x_TH, weight_H, 1e-6, dtype)
    assert_near(rms_norm_quantized(x_TH, weight_H, 1e-6, dtype), expected)
    found = add_rms_norm_quantized(x_TH, residual_TH, weight_H, 1e-6, dtype)
    expected_sum = add_rms_norm_quantized_reference(x_TH, residual_TH, weight_H, 1e-6, dtype)
    assert_near(found, expected_sum)
    assert torch.equal(found[2], expected_sum[2])
    backends.use("auto")
    assert_near(rms_norm_quantized(x_TH, weight_H, 1e-6, dtype), expected)
    assert_near(add_rms_norm_quantized(x_TH, residual_TH, weight_H, 1e-6, dtype), expected_sum)


def test_a_quantized_norm_is_one_launch(launches: list[str]) -> None:
    x_TH = torch.ones(2, 64, dtype=torch.bfloat16)
    add_rms_norm_quantized(x_TH, x_TH, x_TH[0], 1e-6, INT8)
    rms_norm_quantized(x_TH, x_TH[0], 1e-6, FLOAT8)
    assert launches == ["_quantized_norm_kernel"] * 2


@pytest.mark.parametrize("dtype", [INT8, FLOAT8])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 64), (1, 2), (0, 6), (2, 5000)])
def test_activations_are_quantized(
    shape: tuple[int, int], x_dtype: torch.dtype, dtype: torch.dtype, seed: int, launches: list[str]
) -> None:
    torch.manual_seed(seed)
    gate_up_TI = torch.randn(shape, dtype=x_dtype)
    expected = silu_and_mul_quantized_reference(gate_up_TI, dtype)
    assert_near(silu_and_mul_quantized(gate_up_TI, dtype), expected)
    assert launches == (["_silu_and_mul_quantized_kernel"] if len(gate_up_TI) else [])
    backends.use("auto")
    assert_near(silu_and_mul_quantized(gate_up_TI, dtype), expected)


@pytest.mark.parametrize("dtype", [INT8, FLOAT8])
def test_a_row_is_the_same_in_any_batch(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x_TH, weight_H = torch.randn(7, 200).bfloat16(), torch.randn(200).bfloat16()
    ways: list[Callable[[Tensor], tuple[Tensor, ...]]] = [
        lambda x: quantize_rows(x, dtype),
        lambda x: silu_and_mul_quantized(x, dtype),
        lambda x: rms_norm_quantized(x, weight_H, 1e-6, dtype),
        lambda x: add_rms_norm_quantized(x, x, weight_H, 1e-6, dtype),
    ]
    for way in ways:
        together = way(x_TH)
        for row in (0, 5):
            for alone, all_rows in zip(way(x_TH[row : row + 1]), together, strict=True):
                assert torch.equal(alone[0].contiguous().view(torch.uint8), all_rows[row].view(torch.uint8))


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not to torch\.float16"):
        quantize_rows(torch.ones(1, 2), torch.float16)
    with pytest.raises(ValueError, match=r"not to torch\.uint8"):
        silu_and_mul_quantized(torch.ones(1, 2), torch.uint8)


def test_other_strides_are_made_plain(seed: int) -> None:
    torch.manual_seed(seed)
    x_TH = torch.randn(40, 3).bfloat16().T
    for found, expected in zip(quantize_rows(x_TH, INT8), quantize_rows_reference(x_TH, INT8), strict=True):
        assert torch.equal(found, expected)
    wide_TH = torch.randn(3, 100).bfloat16()
    assert torch.equal(quantize_rows(wide_TH[:, 10:50], INT8)[0], quantize_rows_reference(wide_TH[:, 10:50], INT8)[0])
