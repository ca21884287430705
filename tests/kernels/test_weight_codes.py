"""Weights in codes: what AWQ and GPTQ write, packed here number by number, and what blocks of float8 numbers mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slipstream.kernels.float8_codes import Float8Codes
from slipstream.kernels.float8_codes import concatenated as float8_concatenated
from slipstream.kernels.int4_codes import (
    Int4Codes,
    concatenated,
    in_kernel_groups,
    quantize_int4,
    read_awq,
    read_gptq,
)

OUTPUTS, INPUTS, GROUP = 24, 64, 16


def random_codes(seed: int, *, outputs: int = OUTPUTS) -> Int4Codes:
    generator = torch.Generator().manual_seed(seed)
    return Int4Codes(
        codes_OI=torch.randint(0, 16, (outputs, INPUTS), generator=generator, dtype=torch.uint8),
        scales_OG=torch.rand(outputs, INPUTS // GROUP, generator=generator).half().float(),
        zeros_OG=torch.randint(1, 16, (outputs, INPUTS // GROUP), generator=generator, dtype=torch.uint8),
    )


def packed(numbers: np.ndarray, places: list[int]) -> torch.Tensor:
    """Pack eight numbers of the last axis a word, the i-th of them in nibble ``places[i]``."""
    words = np.zeros((numbers.shape[0], numbers.shape[1] // 8), dtype=np.uint32)
    for (row, column), number in np.ndenumerate(numbers):
        words[row, column // 8] |= np.uint32(int(number) << (4 * places[column % 8]))
    return torch.from_numpy(words.view(np.int32))


IN_ORDER = list(range(8))
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Nibble i of a word has output ``AWQ_ORDER[i]`` of eight."""
AWQ_PLACES = [AWQ_ORDER.index(output) for output in range(8)]


def float64_weight(codes: Int4Codes, groups_I: np.ndarray) -> np.ndarray:
    numbers, scales, zeros = (
        part.numpy().astype(np.float64) for part in (codes.codes_OI, codes.scales_OG, codes.zeros_OG)
    )
    return (numbers - zeros[:, groups_I]) * scales[:, groups_I]


def test_awq(seed: int) -> None:
    codes = random_codes(seed)
    found = read_awq(
        packed(codes.codes_OI.numpy().T, AWQ_PLACES),
        packed(codes.zeros_OG.numpy().T, AWQ_PLACES),
        codes.scales_OG.t().half(),
    )
    for part in ("codes_OI", "scales_OG", "zeros_OG"):
        assert torch.equal(getattr(found, part), getattr(codes, part)), part
    assert np.array_equal(
        found.weight().double().numpy(), float64_weight(codes, np.arange(INPUTS) // GROUP).astype(np.float32)
    )


@pytest.mark.parametrize("zeros_less_one", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq(act_order: bool, zeros_less_one: bool, seed: int) -> None:
    codes = random_codes(seed)
    groups_I = np.arange(INPUTS) // GROUP
    if act_order:
        groups_I = np.random.default_rng(seed).permutation(groups_I)
    found = read_gptq(
        packed(codes.codes_OI.numpy(), IN_ORDER).t().contiguous(),
        packed(codes.zeros_OG.numpy().T - int(zeros_less_one), IN_ORDER),
        codes.scales_OG.t().half(),
        torch.from_numpy(groups_I.astype(np.int32)),
        zeros_less_one=zeros_less_one,
    )
    assert (found.order_I is not None) == act_order
    assert np.array_equal(found.weight().numpy(), float64_weight(codes, groups_I).astype(np.float32))


def test_groups_of_other_sizes_than_they_should_be_are_refused(seed: int) -> None:
    codes, groups_I = random_codes(seed), torch.arange(INPUTS, dtype=torch.int32) // GROUP
    groups_I[0] = 1
    words, zeros = packed(codes.codes_OI.numpy(), IN_ORDER).t(), packed(codes.zeros_OG.numpy().T, IN_ORDER)
    with pytest.raises(ValueError, match="g_idx: 64 inputs in 4 groups must have 16 inputs in each group"):
        read_gptq(words, zeros, codes.scales_OG.t(), groups_I, zeros_less_one=False)


def test_rounding_keeps_half_a_step(seed: int) -> None:
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(seed))
    codes = quantize_int4(weight, group=32)
    error = (codes.weight() - weight).view(8, 3, 32).abs().amax(-1)
    assert (error <= codes.scales_OG * 0.5001).all()
    zeros = quantize_int4(torch.zeros(8, 96), group=32)
    assert torch.equal(zeros.weight(), torch.zeros(8, 96))


def test_weights_one_after_the_other(seed: int) -> None:
    parts = [random_codes(seed), random_codes(seed + 1, outputs=8)]
    joined = concatenated(parts)
    assert torch.equal(joined.weight(), torch.cat([part.weight() for part in parts]))
    with pytest.raises(ValueError, match="groups of 16 and of 32"):
        concatenated([parts[0], quantize_int4(torch.zeros(8, INPUTS), group=32)])
    sorted_part = Int4Codes(
        codes_OI=parts[1].codes_OI,
        scales_OG=parts[1].scales_OG,
        zeros_OG=parts[1].zeros_OG,
        order_I=torch.arange(INPUTS).flip(0),
    )
    with pytest.raises(ValueError, match="different orders"):
        concatenated([parts[0], sorted_part])


def test_large_groups_become_several(seed: int) -> None:
    codes = quantize_int4(torch.randn(8, 512, generator=torch.Generator().manual_seed(seed)), group=256)
    smaller = in_kernel_groups(codes)
    assert smaller.group == 128
    assert torch.equal(smaller.weight(), codes.weight())
    with pytest.raises(ValueError, match="groups of 96 inputs"):
        in_kernel_groups(quantize_int4(torch.zeros(8, 96), group=96))


def test_float8_in_blocks(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(6, 40, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(6, 3, generator=generator)
    codes = Float8Codes(values_OI=values, scales_OB=scales, block=16)
    expected = values.double().numpy() * scales.double().numpy()[:, np.arange(40) // 16]
    assert np.array_equal(codes.weight().numpy(), expected.astype(np.float32))
    joined = float8_concatenated([codes, codes])
    assert torch.equal(joined.weight(), torch.cat([codes.weight()] * 2))
    with pytest.raises(ValueError, match="blocks of"):
        float8_concatenated([codes, Float8Codes(values_OI=values, scales_OB=scales[:, :1], block=40)])
