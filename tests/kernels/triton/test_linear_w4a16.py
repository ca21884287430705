"""4-bit weights: the kernel against its reference, the reference against float64, and a row against its company."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from slipstream.kernels import backends
from slipstream.kernels import linear_w4a16 as linear_w4a16_module
from slipstream.kernels.int4_codes import Int4Codes, quantize_int4
from slipstream.kernels.linear_w4a16 import (
    linear_w4a16,
    linear_w4a16_reference,
    pack_int4_matrix,
    unpack_int4_matrix,
    w4a16_configs,
)
from slipstream.kernels.split_sums import split_count

CLOSE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SPLIT = {"_w4a16_kernel", "_split_sums_kernel"}


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_codes(seed: int, outputs: int, inputs: int, group: int) -> Int4Codes:
    codes = quantize_int4(random(seed, outputs, inputs), group=group)
    zeros = torch.randint(0, 17, codes.zeros_OG.shape, generator=torch.Generator().manual_seed(seed))
    return replace(codes, zeros_OG=zeros.to(torch.uint8))


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(
    ("outputs", "inputs", "group", "rows"),
    [
        (70, 320, 32, 3),
        (64, 512, 64, 17),
        (130, 2304, 128, 1),
        (16, 256, 128, 33),
        (1, 32, 32, 2),
        (40, 128, 64, 0),
        (140, 288, 32, 70),
    ],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_kernel_is_the_reference(
    outputs: int,
    inputs: int,
    group: int,
    rows: int,
    with_bias: bool,
    dtype: torch.dtype,
    seed: int,
    launches: list[str],
) -> None:
    matrix = pack_int4_matrix(random_codes(seed, outputs, inputs, group))
    x = random(seed + 1, rows, inputs).to(dtype)
    bias = random(seed + 2, outputs).to(dtype) if with_bias else None
    found = linear_w4a16(x, matrix, bias)
    expected = linear_w4a16_reference(x, matrix, bias)
    assert found.shape == (rows, outputs) and found.is_contiguous()
    scale = float(expected.abs().max()) if rows else 1.0
    torch.testing.assert_close(found, expected, rtol=CLOSE[dtype], atol=CLOSE[dtype] * scale)
    is_split = inputs > 2048
    assert set(launches) == (set() if rows == 0 else SPLIT if is_split else {"_w4a16_kernel"})


def test_reference_is_float64s(seed: int) -> None:
    codes = random_codes(seed, 24, 128, 64)
    x, bias = random(seed + 1, 5, 128), random(seed + 2, 24)
    zeros, scales = (part.double().numpy().repeat(64, axis=1) for part in (codes.zeros_OG, codes.scales_OG))
    weight = (codes.codes_OI.double().numpy() - zeros) * scales
    expected = x.double().numpy() @ weight.T + bias.double().numpy()
    found = linear_w4a16_reference(x, pack_int4_matrix(codes), bias).double().numpy()
    # A scale keeps 16 bits of its mantissa.
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_packing_loses_nothing_of_scales_of_16_bits(group: int, seed: int) -> None:
    codes = random_codes(seed, 70, 384, group)
    codes = replace(codes, scales_OG=codes.scales_OG.half().float())
    unpacked = unpack_int4_matrix(pack_int4_matrix(codes))
    for part in ("codes_OI", "scales_OG", "zeros_OG"):
        assert torch.equal(getattr(unpacked, part), getattr(codes, part)), part


def test_inputs_in_an_order_of_their_own(seed: int) -> None:
    order = torch.randperm(128, generator=torch.Generator().manual_seed(seed))
    codes = replace(random_codes(seed, 32, 128, 64), order_I=order)
    x = random(seed + 1, 4, 128).half()
    found = linear_w4a16(x, pack_int4_matrix(codes))
    expected = x.double().numpy() @ codes.weight().double().numpy().T
    assert np.abs(found.double().numpy() - expected).max() <= 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("inputs", [256, 2048])
def test_one_way_gives_a_row_the_same_bits_in_any_company(inputs: int, seed: int) -> None:
    matrix = pack_int4_matrix(random_codes(seed, 20, inputs, 64))
    x = random(seed + 1, 19, inputs).bfloat16()
    whole = linear_w4a16(x, matrix, one_way=True)
    for first, last in ((0, 1), (18, 19), (2, 13), (1, 18)):
        assert torch.equal(linear_w4a16(x[first:last], matrix, one_way=True), whole[first:last]), (first, last)


@pytest.mark.parametrize("inputs", [256, 2048])
def test_wide_products_are_not_rounded(inputs: int, seed: int) -> None:
    matrix = pack_int4_matrix(random_codes(seed, 20, inputs, 64))
    x, bias = random(seed + 1, 3, inputs).bfloat16(), random(seed + 2, 20).bfloat16()
    found = linear_w4a16(x, matrix, bias, wide=True)
    expected = linear_w4a16_reference(x, matrix, bias, wide=True)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_rows_that_lie_apart(seed: int) -> None:
    """Rows of a larger tensor: what is between them is never read, and neither are rows behind the last."""
    matrix = pack_int4_matrix(random_codes(seed, 16, 256, 64))
    around = torch.full((9, 280), float("nan"), dtype=torch.float16)
    around[:5, :256] = random(seed + 1, 5, 256).half()
    for x in (around[:5, :256], around.t().contiguous().t()[:5, :256]):
        assert torch.equal(linear_w4a16(x, matrix), linear_w4a16(x.contiguous(), matrix))
    odd = torch.full((5, 259), float("nan"), dtype=torch.float16)
    odd[:, :256] = around[:5, :256]
    assert torch.equal(linear_w4a16(odd[:, :256], matrix), linear_w4a16(around[:5, :256].contiguous(), matrix))


def test_what_is_not_multiplied_by_the_kernel(seed: int, launches: list[str]) -> None:
    matrix = pack_int4_matrix(random_codes(seed, 16, 64, 32))
    x = random(seed + 1, 3, 64)
    assert torch.equal(linear_w4a16(x, matrix), linear_w4a16_reference(x, matrix))
    backends.use("torch")
    half = x.half()
    assert torch.equal(linear_w4a16(half, matrix), linear_w4a16_reference(half, matrix))
    assert not launches
    with pytest.raises(ValueError, match=r"x_TI: \[tokens, 64\]"):
        linear_w4a16(x[:, :32], matrix)


def test_configurations_are_chosen_by_rows() -> None:
    tile_rows = [[config.tiles["BLOCK_M"] for config in w4a16_configs(rows)] for rows in (1, 16, 17, 64, 65, 4096)]
    assert tile_rows == [[16], [16], [32], [32], [64, 128], [64, 128]]
    assert all(w4a16_configs(rows, one_way=True) == w4a16_configs(1) for rows in (1, 16, 17, 4096))
    assert w4a16_configs(4096, wide=True) == w4a16_configs(64)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_tiles_for_many_rows_that_tuning_may_choose(group: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are in one order in both: also the last bit is the same."""
    matrix = pack_int4_matrix(random_codes(seed, 140, 512, group))
    x = random(seed + 1, 131, 512).bfloat16()
    found = linear_w4a16(x, matrix)
    monkeypatch.setattr(linear_w4a16_module, "_MANY", linear_w4a16_module._MANY[::-1])
    assert torch.equal(linear_w4a16(x, matrix), found)


@pytest.mark.parametrize(
    ("tiles", "steps", "splits"),
    [(64, 16, 4), (64, 56, 4), (96, 16, 4), (448, 16, 1), (1, 7, 1), (1, 8, 2), (1, 4096, 256), (0, 0, 1)],
)
def test_splits_are_powers_of_two_by_the_weights_shape(tiles: int, steps: int, splits: int) -> None:
    assert split_count(tiles, steps) == splits


def test_one_way_splits_a_shard_of_the_outputs_as_the_whole() -> None:
    for steps in (1, 7, 16, 56, 4096):
        assert len({split_count(tiles, steps, one_way=True) for tiles in (1, 16, 64, 448)}) == 1
