"""The product in one order: against its reference and float64; a row's bits in any company, by shard and by rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slipstream.kernels.linear_fixed import fixed_linear, fixed_linear_reference
from slipstream.kernels.tree_sum import LEAVES, add_stacked

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def operands(seed: int, tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    x_TI, weight_OI = torch.randn(tokens, inputs), torch.randn(outputs, inputs) / inputs**0.5
    return x_TI.to(dtype), weight_OI.to(dtype), torch.randn(outputs).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("leaves", [0, 1, 8])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(3, 72, 70), (1, 8, 1), (0, 16, 5), (18, 128, 3)])
def test_kernel_is_the_reference(
    tokens: int, inputs: int, outputs: int, leaves: int, split: bool, dtype: torch.dtype, seed: int
) -> None:
    x_TI, weight_OI, bias_O = operands(seed, tokens, inputs, outputs, dtype)
    for bias in (bias_O, None):
        found = fixed_linear(x_TI, weight_OI, bias, leaves=leaves, split=split, dtype=dtype)
        expected = fixed_linear_reference(x_TI, weight_OI, bias, leaves=max(leaves, 1), dtype=dtype)
        torch.testing.assert_close(found, expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])
        exact = x_TI.double() @ weight_OI.double().T + (0 if bias is None else bias.double())
        torch.testing.assert_close(found.double(), exact, rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leaves", [0, 8])
def test_a_row_is_the_same_bits_in_any_company(leaves: int, dtype: torch.dtype, seed: int) -> None:
    x_TI, weight_OI, bias_O = operands(seed, 70, 128, 20, dtype)
    whole = fixed_linear(x_TI, weight_OI, bias_O, leaves=leaves, dtype=dtype)
    for row in (0, 33, 69):
        alone = fixed_linear(x_TI[row : row + 1], weight_OI, bias_O, leaves=leaves, dtype=dtype)
        assert torch.equal(alone[0], whole[row])
    assert torch.equal(fixed_linear(x_TI.flip(0), weight_OI, bias_O, leaves=leaves, dtype=dtype).flip(0), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_output_is_the_same_bits_in_any_shard(dtype: torch.dtype, seed: int) -> None:
    x_TI, weight_OI, bias_O = operands(seed, 5, 80, 150, dtype)
    whole = fixed_linear(x_TI, weight_OI, bias_O, dtype=dtype)
    for first, last in ((0, 75), (75, 150), (7, 20)):
        shard = fixed_linear(x_TI, weight_OI[first:last], bias_O[first:last], dtype=dtype)
        assert torch.equal(shard, whole[:, first:last])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("inputs", [8 * 18, 8 * 16])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_ranks_have_the_bits_of_one(ranks: int, inputs: int, split: bool, dtype: torch.dtype, seed: int) -> None:
    x_TI, weight_OI, bias_O = operands(seed, 5, inputs, 30, dtype)
    one = fixed_linear(x_TI, weight_OI, bias_O, leaves=LEAVES, split=not split, dtype=dtype)
    shards = zip(x_TI.chunk(ranks, 1), weight_OI.chunk(ranks, 1), strict=True)
    subtrees = [
        fixed_linear(x, weight, None if rank else bias_O, leaves=LEAVES // ranks, split=split, dtype=torch.float32)
        for rank, (x, weight) in enumerate(shards)
    ]
    assert torch.equal(add_stacked(torch.stack(subtrees), dtype), one)


def test_operands_that_are_slices(seed: int) -> None:
    x_TI, weight_OI, bias_O = operands(seed, 6, 64, 40, torch.float32)
    poisoned_x, poisoned_weight = torch.full((6, 90), torch.nan), torch.full((40, 70), torch.nan)
    poisoned_x[:, 9:73], poisoned_weight[:, 3:67] = x_TI, weight_OI
    found = fixed_linear(poisoned_x[:, 9:73], poisoned_weight[:, 3:67], bias_O, leaves=8, dtype=torch.float32)
    assert torch.equal(found, fixed_linear(x_TI, weight_OI, bias_O, leaves=8, dtype=torch.float32))


def test_what_is_refused() -> None:
    x_TI, weight_OI = torch.zeros(2, 12), torch.zeros(3, 12)
    for problem, x, weight, bias, leaves in (
        ("weight: .* must be one of", x_TI, weight_OI.double(), None, 1),
        ("weight: .* does not fit x", x_TI, weight_OI[:, 1:], None, 1),
        ("leaves: 8 do not cut 12 inputs", x_TI, weight_OI, None, 8),
        ("leaves: 3 do not cut", x_TI, weight_OI, None, 3),
        ("bias: .* does not fit 3 outputs", x_TI, weight_OI, torch.zeros(2), 1),
    ):
        with pytest.raises(ValueError, match=problem):
            fixed_linear(x, weight, bias, leaves=leaves, dtype=torch.float32)
