"""8-bit weights and activations: the kernel against its reference, and a row against its company."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slipstream.kernels.linear_w8a8 import (
    BYTE_TYPES,
    linear_w8a8,
    linear_w8a8_reference,
    linear_w8a8_rows,
    pack_byte_matrix,
    quantize_matrix,
)
from slipstream.kernels.quantize_rows import quantize_rows
from slipstream.kernels.split_sums import split_sums_, split_sums_reference

CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", BYTE_TYPES)
@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(
    ("outputs", "inputs", "rows"), [(70, 300, 3), (64, 1280, 17), (130, 1024, 1), (16, 128, 65), (1, 1, 2), (8, 16, 0)]
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_kernel_is_the_reference(
    outputs: int,
    inputs: int,
    rows: int,
    with_bias: bool,
    dtype: torch.dtype,
    kind: torch.dtype,
    seed: int,
    launches: list[str],
) -> None:
    matrix = quantize_matrix(random(seed, outputs, inputs), kind)
    x = random(seed + 1, rows, inputs).to(dtype)
    bias = random(seed + 2, outputs).to(dtype) if with_bias else None
    rows_TI, scales_T1 = quantize_rows(x, kind)
    launches.clear()
    found = linear_w8a8_rows(rows_TI, scales_T1, matrix, bias, dtype=dtype)
    expected = linear_w8a8_reference(rows_TI, scales_T1, matrix, bias, dtype)
    assert found.shape == (rows, outputs) and found.dtype == dtype and found.is_contiguous()
    # Sums of integers are exact; so is all that follows them, up to the order of two products.
    close = CLOSE[dtype] if kind != torch.int8 else CLOSE[dtype] / 10
    scale = float(expected.abs().max()) if rows else 1.0
    torch.testing.assert_close(found, expected, rtol=CLOSE[dtype], atol=close * scale)
    is_split = inputs >= 1024 and rows <= 64
    kernels = {"_w8a8_kernel", "_split_sums_kernel"} if is_split else {"_w8a8_kernel"}
    assert set(launches) == (kernels if rows else set())
    assert torch.equal(linear_w8a8(x, matrix, bias), found)


@pytest.mark.parametrize("kind", BYTE_TYPES)
def test_reference_is_what_the_numbers_stand_for(kind: torch.dtype, seed: int) -> None:
    weight, x = random(seed, 24, 96), random(seed + 1, 5, 96)
    matrix = quantize_matrix(weight, kind)
    rows, scales = quantize_rows(x, kind)
    expected = (rows.float().double() * scales.double()).numpy() @ matrix.weight().double().numpy().T
    found = linear_w8a8_reference(rows, scales, matrix, None, torch.float32).double().numpy()
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
    step = 1 / 254 if kind == torch.int8 else 1 / 16
    error = (matrix.weight() - weight).abs() / weight.abs().amax(1, keepdim=True)
    assert float(error.max()) <= step * 1.001


@pytest.mark.parametrize("kind", BYTE_TYPES)
@pytest.mark.parametrize("inputs", [128, 1024])
def test_one_way_gives_a_row_the_same_bits_in_any_company(inputs: int, kind: torch.dtype, seed: int) -> None:
    matrix = quantize_matrix(random(seed, 20, inputs), kind)
    x = random(seed + 1, 66, inputs).bfloat16()
    # Integers have the same bits in any way.
    for one_way in (True, False) if kind == torch.int8 else (True,):
        whole = linear_w8a8(x, matrix, one_way=one_way)
        for first, last in ((0, 1), (65, 66), (3, 20)):
            assert torch.equal(linear_w8a8(x[first:last], matrix, one_way=one_way), whole[first:last]), (first, last)


def test_rows_that_lie_apart(seed: int) -> None:
    matrix = quantize_matrix(random(seed, 16, 144), torch.int8)
    rows, scales = quantize_rows(random(seed + 1, 5, 144), torch.int8)
    around = torch.full((7, 150), 127, dtype=torch.int8)
    around[:5, :144] = rows
    expected = linear_w8a8_rows(rows, scales, matrix, dtype=torch.float32)
    assert torch.equal(linear_w8a8_rows(around[:5, :144], scales, matrix, dtype=torch.float32), expected)


def test_what_does_not_fit_is_refused(seed: int) -> None:
    matrix = quantize_matrix(random(seed, 16, 64), torch.int8)
    rows, scales = quantize_rows(random(seed, 2, 32), torch.int8)
    with pytest.raises(ValueError, match=r"rows_TI: \[tokens, 64\] torch.int8"):
        linear_w8a8_rows(rows, scales, matrix, dtype=torch.float32)
    rows, scales = quantize_rows(random(seed, 2, 64), torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="float8"):
        linear_w8a8_rows(rows, scales, matrix, dtype=torch.float32)


def test_one_scale_for_a_whole_weight(seed: int) -> None:
    values = random(seed, 24, 64).to(torch.float8_e4m3fn)
    matrix = pack_byte_matrix(values, torch.full((24,), 0.25))
    assert torch.equal(matrix.weight(), values.float() * 0.25)


@pytest.mark.parametrize("parts_dtype", [torch.float32, torch.int32])
@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(("splits", "rows", "outputs"), [(1, 2, 16), (4, 3, 528), (3, 0, 16)])
def test_split_sums(
    splits: int, rows: int, outputs: int, dtype: torch.dtype, parts_dtype: torch.dtype, seed: int
) -> None:
    parts = (random(seed, splits, rows, outputs) * 100).to(parts_dtype)
    row_scales, output_scales = random(seed + 1, rows, 1), random(seed + 2, outputs)
    bias = random(seed + 3, outputs - 5).to(dtype)
    out = torch.empty(rows, outputs, dtype=dtype)
    split_sums_(out, parts, row_scales_T1=row_scales, output_scales_O=output_scales, bias_O=bias)
    padded = torch.nn.functional.pad(bias, (0, 5))
    expected = split_sums_reference(parts, row_scales, output_scales, padded, dtype)
    torch.testing.assert_close(out, expected, rtol=CLOSE[dtype], atol=CLOSE[dtype] * 100)
