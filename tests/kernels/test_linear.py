"""Linear layers in every format: against float64, and a row's bits against its company."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch

from slipstream.kernels.cpu.linear_int4 import GROUP, MANY_ROWS, can_pack_int4, linear_int4, pack_int4, unpack_int4
from slipstream.kernels.cpu.linear_int8 import linear_int8, pack_int8, quantize_rows
from slipstream.kernels.cpu.linear_packed import can_pack, linear_packed, pack_weight
from slipstream.kernels.cpu.linear_panels import Panels
from slipstream.kernels.cpu.row_buckets import in_buckets
from slipstream.tests.kernels.native_ways import torch_alone

CPU = torch.device("cpu")
SHAPES = [(160, 64), (96, 1024), (48, 1056), (32, 4096), (513, 96), (7, 5)]
"""Outputs, inputs: around the length of sums at which oneDNN changes its ways, and odd ones."""
ROWS = [1, 2, 3, 5, 8, 16, 31, 33, 64, 130]
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

pytestmark = pytest.mark.skipif(not can_pack(torch.bfloat16, CPU), reason="oneDNN has no bfloat16 on this CPU")


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> np.ndarray:
    result = x.double().numpy() @ weight.double().numpy().T
    return result if bias is None else result + bias.double().numpy()


def check(found: torch.Tensor, expected: np.ndarray, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert np.abs(found.double().numpy() - expected).max() <= TOLERANCE[dtype] * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_packed(outputs: int, inputs: int, dtype: torch.dtype, with_bias: bool, seed: int) -> None:
    weight = random(seed, outputs, inputs).to(dtype) / 8
    bias = random(seed + 1, outputs).to(dtype) if with_bias else None
    packed = pack_weight(weight)
    for rows in ROWS:
        x = random(seed + rows, rows, inputs).to(dtype)
        check(linear_packed(x, packed, bias), product(x, weight, bias), dtype)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_int8(outputs: int, inputs: int, dtype: torch.dtype, with_bias: bool, seed: int) -> None:
    """Against the product of what the quantized numbers stand for: integers add up without any error."""
    weight = random(seed, outputs, inputs).to(dtype) / 8
    bias = random(seed + 1, outputs).to(dtype) if with_bias else None
    packed = pack_int8(weight)
    weight_integers, weight_scales = quantize_rows(weight)
    assert (weight_integers * weight_scales - weight.float()).abs().max() <= weight_scales.max() / 2 * 1.001
    for rows in ROWS:
        x = random(seed + rows, rows, inputs).to(dtype)
        integers, scales = quantize_rows(x)
        expected = product(integers, weight_integers, None) * (scales.double() * weight_scales.double().T).numpy()
        check(linear_int8(x, packed, bias), expected if bias is None else expected + bias.double().numpy(), dtype)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("one_way", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(160, 64), (96, 1024), (32, 4096), (16, GROUP)])
def test_int4(outputs: int, inputs: int, dtype: torch.dtype, one_way: bool, with_bias: bool, seed: int) -> None:
    weight = random(seed, outputs, inputs).to(dtype) / 8
    bias = random(seed + 1, outputs).to(dtype) if with_bias else None
    packed = pack_int4(weight)
    unpacked = unpack_int4(packed, 0, outputs)
    largest = weight.float().view(outputs, -1, GROUP).abs().amax(-1)
    error = (unpacked.float() - weight.float()).view(outputs, -1, GROUP).abs().amax(-1)
    assert (error <= largest / 7 * 0.51 + 1e-2 * largest).all(), "half a step, and the rounding of scales"
    for rows in [*ROWS, MANY_ROWS - 1, MANY_ROWS]:
        x = random(seed + rows, rows, inputs).to(dtype)
        check(linear_int4(x, packed, bias, one_way=one_way), product(x, unpacked, bias), dtype)


def test_what_four_bits_cannot_hold() -> None:
    assert can_pack_int4(torch.zeros(32, 64))
    assert not can_pack_int4(torch.zeros(32, 40))
    assert not can_pack_int4(torch.zeros(30, 64))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, dtype) for name in ("packed", "int8") for dtype in DTYPES), ("int4", torch.bfloat16)],
)
def test_a_row_is_the_same_bits_in_any_company(name: str, dtype: torch.dtype, threads: int, seed: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for outputs, inputs in ((160, 64), (768, 2048), (256, 8192), (4096, 768)):
            weight = random(seed, outputs, inputs).to(dtype) / 8
            x = random(seed + 1, 300, inputs).to(dtype)
            match name:
                case "packed":
                    packed = pack_weight(weight)
                    run = lambda rows, packed=packed: linear_packed(rows, packed)  # noqa: E731
                case "int8":
                    eight = pack_int8(weight)
                    run = lambda rows, eight=eight: linear_int8(rows, eight)  # noqa: E731
                case _:
                    four = pack_int4(weight)
                    run = lambda rows, four=four: linear_int4(rows, four, one_way=True)  # noqa: E731
            whole = run(x)
            for rows in (1, 2, 3, 7, 8, 15, 17, 32, 33, 63, 64, 65, 127, 129, 200):
                assert torch.equal(run(x[:rows].contiguous()), whole[:rows]), (outputs, inputs, rows)
                assert torch.equal(run(x[300 - rows :].contiguous()), whole[300 - rows :]), (outputs, inputs, rows)
    finally:
        torch.set_num_threads(before)


def test_products_come_in_few_shapes(seed: int) -> None:
    seen: set[int] = set()

    def multiply(x: torch.Tensor) -> torch.Tensor:
        seen.add(x.shape[0])
        return x[:, :3] * 2

    for rows in (0, 1, 7, 8, 9, 64, 65, 255, 256, 257, 511, 512, 700, 2048):
        x = random(seed, rows, 5)
        assert torch.equal(in_buckets(x, multiply), x[:, :3] * 2), rows
    for rows in range(1, 2049):
        in_buckets(torch.zeros(rows, 5), multiply)
    assert len(seen - {0}) <= 24


def test_zeros_and_large_numbers() -> None:
    eight = pack_int8(torch.zeros(8, 16))
    assert torch.equal(linear_int8(torch.zeros(2, 16), eight), torch.zeros(2, 8))
    four = pack_int4(torch.zeros(16, 32, dtype=torch.bfloat16))
    ones = torch.ones(2, 32, dtype=torch.bfloat16)
    assert torch.equal(linear_int4(ones, four), torch.zeros(2, 16, dtype=torch.bfloat16))
    large = torch.full((16, 32), 3e30)
    found = linear_int8(torch.full((1, 32), 1e5), pack_int8(large))
    assert torch.allclose(found, torch.full((1, 16), 32 * 3e35), rtol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_torch", [False, True])
def test_wide_products_are_float32_and_round_to_the_others(by_torch: bool, dtype: torch.dtype, seed: int) -> None:
    with torch_alone() if by_torch else nullcontext():
        weight, x = random(seed, 96, 128).to(dtype) / 8, random(seed + 1, 7, 160).to(dtype)
        bias = random(seed + 2, 96).to(dtype)
        packed, eight = pack_weight(weight), pack_int8(weight)
        products = [partial(linear_packed, x[:, 16:144], packed), partial(linear_int8, x[:, 16:144], eight)]
        if dtype == torch.bfloat16:
            products.append(partial(linear_int4, x[:, 16:144], pack_int4(weight), one_way=True))
        for multiply in products:
            for added in (bias, None):
                wide = multiply(added, wide=True)
                assert wide.dtype == torch.float32
                assert torch.equal(wide.to(dtype), multiply(added))
        exact = product(x[:, 16:144], weight, bias)
        closer = TOLERANCE[torch.float32 if isinstance(packed, Panels) else dtype] * np.abs(exact).max()
        assert np.abs(linear_packed(x[:, 16:144], packed, bias, wide=True).numpy() - exact).max() <= closer
