"""Compiled products against float64, over shapes that fill panels and tiles and that do not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from slipstream.kernels.cpu.linear_int4 import linear_int4, pack_int4, unpack_int4
from slipstream.kernels.cpu.linear_int4_panels import Int4Panels
from slipstream.kernels.cpu.linear_int8 import linear_int8, pack_int8
from slipstream.kernels.cpu.linear_int8_panels import Int8Panels
from slipstream.kernels.cpu.linear_packed import linear_packed, pack_weight
from slipstream.kernels.cpu.linear_panels import Panels
from slipstream.tests.kernels.native_ways import torch_alone

pytestmark = pytest.mark.usefixtures("compiled")

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SHAPES = [(1, 4), (15, 32), (64, 64), (65, 96), (130, 1024), (200, 32), (63, 2080)]
ROWS = [0, 1, 2, 3, 4, 5, 6, 7, 12, 47, 48, 49, 97]


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(found: torch.Tensor, expected: np.ndarray, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.shape == expected.shape
    largest = np.abs(expected).max(initial=1.0)
    assert np.abs(found.double().numpy() - expected).max(initial=0.0) <= TOLERANCE[dtype] * largest


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> np.ndarray:
    result = x.double().numpy() @ weight.double().numpy().T
    return result if bias is None else result + bias.double().numpy()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_panels(outputs: int, inputs: int, dtype: torch.dtype, with_bias: bool, seed: int) -> None:
    weight = random(seed, outputs, inputs).to(dtype) / 8
    bias = random(seed + 1, outputs).to(dtype) if with_bias else None
    packed = pack_weight(weight)
    if not isinstance(packed, Panels):
        pytest.skip(f"this machine multiplies {dtype} in another way")
    for rows in ROWS:
        wide = random(seed + rows, rows, inputs + 8).to(dtype)
        x = wide[:, :inputs]
        found = linear_packed(x, packed, bias)
        check(found, product(x, weight, bias), dtype)
        for row in range(0, rows, 5):
            assert torch.equal(linear_packed(x[row : row + 1], packed, bias), found[row : row + 1]), (rows, row)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_int8_is_what_torch_makes_of_it(outputs: int, inputs: int, dtype: torch.dtype, seed: int) -> None:
    weight = random(seed, outputs, inputs).to(dtype) / 8
    bias = random(seed + 1, outputs).to(dtype)
    packed = pack_int8(weight)
    if not isinstance(packed, Int8Panels):
        pytest.skip("this machine multiplies 8-bit integers in another way")
    with torch_alone():
        other = pack_int8(weight)
    for rows in ROWS:
        x = random(seed + rows, rows, inputs).to(dtype)
        check(linear_int8(x, packed, bias), linear_int8(x, other, bias).double().numpy(), dtype)
    broken = random(seed, 3, inputs).to(dtype)
    broken[1, inputs - 1] = math.nan
    found = linear_int8(broken, packed)
    assert found[1].isnan().all() and found[::2].isfinite().all()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (64, 64), (80, 96), (144, 2048)])
def test_int4(outputs: int, inputs: int, with_bias: bool, seed: int) -> None:
    weight = random(seed, outputs, inputs).bfloat16() / 8
    bias = random(seed + 1, outputs).bfloat16() if with_bias else None
    packed = pack_int4(weight)
    if not isinstance(packed, Int4Panels):
        pytest.skip("this machine has no products of bfloat16 in registers")
    with torch_alone():
        assert torch.equal(unpack_int4(packed, 3, 11), unpack_int4(pack_int4(weight), 3, 11))
    unpacked = unpack_int4(packed, 0, outputs)
    for rows in ROWS:
        x = random(seed + rows, rows, inputs).bfloat16()
        found = linear_int4(x, packed, bias)
        check(found, product(x, unpacked, bias), torch.bfloat16)
        for row in range(0, rows, 5):
            assert torch.equal(linear_int4(x[row : row + 1], packed, bias), found[row : row + 1]), (rows, row)


def test_no_weight_is_there_twice(seed: int) -> None:
    weight = random(seed, 256, 512)
    panels = pack_weight(weight)
    if isinstance(panels, Panels):
        assert panels.words_PSVL.nbytes == weight.nbytes
    eight, four = pack_int8(weight), pack_int4(weight.bfloat16())
    if isinstance(eight, Int8Panels):
        assert eight.words.nbytes == weight.numel()
    if isinstance(four, Int4Panels):
        assert four.words_PGRVL2.nbytes == weight.numel() // 2
