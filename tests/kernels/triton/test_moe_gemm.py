"""Products of experts: both ways against the reference, the reference against float64; whole MLPs and their sums."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream.kernels import backends, moe_gemm
from slipstream.kernels.gate import SILU, Gate, GateKind
from slipstream.kernels.moe_combine import weighted_sum, weighted_sum_reference
from slipstream.kernels.moe_gemm import block_product, can_mask, expert_product_reference, masked_product
from slipstream.kernels.moe_mlp import StackedExperts, expert_products, moe_mlp, moe_mlp_stacked, stacked_products
from slipstream.kernels.moe_sort import count_by_expert, sort_into_blocks

CLOSE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
EXPERTS = 5
SIZES = {"aligned": (48, 32), "odd": (37, 21), "one": (1, 1)}
"""Inputs, outputs"""


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def choices_of(seed: int, tokens: int, chosen: int, num_experts: int = EXPERTS) -> Tensor:
    """Return experts of which the last but one is never chosen."""
    odds = torch.ones(max(tokens, 1), num_experts)
    odds[:, -2] = 0
    return torch.multinomial(odds, chosen, generator=torch.Generator().manual_seed(seed))[:tokens]


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [("aligned", torch.bfloat16), ("aligned", torch.float16), *((size, torch.float32) for size in SIZES)],
)
def test_both_ways_are_the_reference(size: str, dtype: torch.dtype, is_gated: bool, seed: int) -> None:
    inputs, outputs = SIZES[size]
    weights_EOI = random(seed, EXPERTS, outputs * (2 if is_gated else 1), inputs, dtype=dtype) / 4
    for tokens, chosen in ((1, 1), (3, 4), (18, 2)):
        experts_TA = choices_of(seed, tokens, chosen)
        # Of gate and up the rows are tokens, of down entries.
        x_TI = random(seed + 1, tokens if is_gated else tokens * chosen, inputs, dtype=dtype)
        expected_RO = expert_product_reference(
            x_TI, weights_EOI, experts_TA.flatten(), chosen=chosen if is_gated else 1, is_gated=is_gated
        )
        blocks = sort_into_blocks(experts_TA.flatten(), EXPERTS, 64)
        found = [block_product(x_TI, weights_EOI, blocks, entries=tokens * chosen, is_gated=is_gated)]
        if can_mask(dtype, tokens, chosen):
            found.append(masked_product(x_TI, weights_EOI, experts_TA, is_gated=is_gated))
        assert len(found) == (2 if dtype.itemsize == 2 else 1)
        for found_RO in found:
            torch.testing.assert_close(found_RO, expected_RO, rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize("gate", [SILU, Gate(kind=GateKind.CLAMPED, alpha=1.702, limit=1.0)], ids=lambda it: it.kind)
@pytest.mark.parametrize("is_gated", [False, True])
def test_biases_and_clamped_gates(is_gated: bool, gate: Gate, seed: int) -> None:
    tokens, chosen, inputs, outputs = 7, 2, 48, 32
    experts_TA = choices_of(seed, tokens, chosen)
    x_TI = random(seed, tokens * chosen, inputs, dtype=torch.bfloat16)
    weights_EOI = random(seed + 1, EXPERTS, outputs * (1 + is_gated), inputs, dtype=torch.bfloat16) / 4
    biases_EO = random(seed + 2, *weights_EOI.shape[:2], dtype=torch.bfloat16)
    expected_RO = expert_product_reference(
        x_TI, weights_EOI, experts_TA.flatten(), chosen=1, is_gated=is_gated, biases_EO=biases_EO, gate=gate
    )
    how: dict[str, Any] = {"is_gated": is_gated, "biases_EO": biases_EO, "gate": gate}
    blocks = sort_into_blocks(experts_TA.flatten(), EXPERTS, 64)
    for found_RO in (
        block_product(x_TI, weights_EOI, blocks, entries=tokens * chosen, **how),
        masked_product(x_TI, weights_EOI, experts_TA, **how),
    ):
        torch.testing.assert_close(found_RO, expected_RO, rtol=3e-2, atol=3e-2)
    # The reference itself, in float64.
    rows_RO = torch.einsum("ri,roi->ro", x_TI.double(), weights_EOI.double()[experts_TA.flatten()])
    rows_RO += biases_EO.double()[experts_TA.flatten()]
    if is_gated:
        gate_RO, up_RO = rows_RO.chunk(2, dim=1)
        if gate is not SILU:
            gate_RO, up_RO = gate_RO.clamp(max=1.0), up_RO.clamp(-1.0, 1.0) + 1
        rows_RO = gate_RO / (1 + torch.exp(-gate.alpha * gate_RO)) * up_RO
    torch.testing.assert_close(expected_RO.double(), rows_RO, rtol=1.6e-2, atol=1e-3)


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("place", [0, 1])
def test_large_blocks_in_each_configuration(
    place: int, is_gated: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_TI, weights_EOI = random(seed, 300, 32).bfloat16(), random(seed + 1, 2, 64, 32).bfloat16() / 4
    experts_R = choices_of(seed, 300, 1, 3).flatten() // 2
    places = moe_gemm.block_places(weights_EOI, 300)
    assert places == 128
    configs = moe_gemm.block_configs(torch.bfloat16, places, is_gated=is_gated, is_wide=True)
    monkeypatch.setattr(moe_gemm, "block_configs", lambda *_, **__: configs[place:])
    found_RO = block_product(x_TI, weights_EOI, sort_into_blocks(experts_R, 2, places), entries=300, is_gated=is_gated)
    expected_RO = expert_product_reference(x_TI, weights_EOI, experts_R, chosen=1, is_gated=is_gated)
    torch.testing.assert_close(found_RO, expected_RO, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("is_gated", [False, True])
def test_reference_is_a_float64_formula(is_gated: bool, seed: int) -> None:
    x_TI, weights_EOI = random(seed, 4, 9), random(seed + 1, EXPERTS, 6, 9)
    experts_TA = choices_of(seed, 4, 3)
    found_RO = expert_product_reference(x_TI, weights_EOI, experts_TA.flatten(), chosen=3, is_gated=is_gated)
    expected_TAO = torch.einsum("ti,taoi->tao", x_TI.double(), weights_EOI.double()[experts_TA])
    if is_gated:
        gate_TAO, up_TAO = expected_TAO.chunk(2, -1)
        expected_TAO = gate_TAO / (1 + torch.exp(-gate_TAO)) * up_TAO
    torch.testing.assert_close(found_RO.double(), expected_TAO.flatten(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("way", "dtype"), [("masked", torch.bfloat16), ("blocks", torch.bfloat16), ("blocks", torch.float32)]
)
def test_an_entry_has_the_same_bits_in_any_batch(way: str, dtype: torch.dtype, seed: int) -> None:
    x_TI, weights_EOI = random(seed, 20, 48, dtype=dtype), random(seed + 1, EXPERTS, 64, 48, dtype=dtype)
    experts_TA = choices_of(seed, 20, 2)

    def run(first: int, last: int) -> Tensor:
        some_TI, some_TA = x_TI[first:last], experts_TA[first:last]
        if way == "masked":
            out_RO = masked_product(some_TI, weights_EOI, some_TA, is_gated=True)
        else:
            blocks = sort_into_blocks(some_TA.flatten(), EXPERTS, 64)
            out_RO = block_product(some_TI, weights_EOI, blocks, entries=some_TA.numel(), is_gated=True)
        return out_RO.view(-1, 2, 32)

    expected_TAO = run(0, 16)
    for first, last in ((0, 1), (5, 6), (15, 16), (3, 12)):
        assert torch.equal(run(first, last), expected_TAO[first:last])
    if way == "blocks":
        assert torch.equal(run(0, 20)[:16], expected_TAO)


def stacked(seed: int, hidden: int, inner: int, dtype: torch.dtype) -> StackedExperts:
    return StackedExperts(
        gate_up_EOH=random(seed, EXPERTS, 2 * inner, hidden, dtype=dtype) / 4,
        down_EHI=random(seed + 1, EXPERTS, hidden, inner, dtype=dtype) / 4,
    )


def multiply(weight_OI: Tensor, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x_TI, weight_OI, bias_O)


MASKED = ["_masked_product_kernel", "_masked_product_kernel"]
BLOCKS = ["_count_entries_kernel", "_place_entries_kernel", "_block_product_kernel", "_block_product_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 32, 33])
def test_an_mlp_is_that_of_separate_products(tokens: int, dtype: torch.dtype, seed: int, launches: list[str]) -> None:
    experts = stacked(seed, 32, 16, dtype)
    x_TH, experts_TA = random(seed + 2, tokens, 32, dtype=dtype), choices_of(seed, tokens, 2)
    weights_TA = random(seed + 3, tokens, 2).softmax(1)
    assert experts.can_multiply(x_TH)
    found_TH = moe_mlp_stacked(x_TH, weights_TA, experts_TA, experts)
    products = MASKED if tokens <= 32 and dtype is torch.bfloat16 else BLOCKS
    assert launches == ([*products, "_weighted_sum_kernel"] if tokens else [])
    backends.use("torch")
    assert not experts.can_multiply(x_TH)
    gate_up, down = ([partial(multiply, each) for each in all_] for all_ in (experts.gate_up_EOH, experts.down_EHI))
    expected_TH = moe_mlp(x_TH, weights_TA, experts_TA, gate_up, down)
    torch.testing.assert_close(found_TH, expected_TH, rtol=CLOSE[dtype], atol=CLOSE[dtype])


def test_products_of_sorted_rows_and_padding(seed: int, launches: list[str]) -> None:
    experts = stacked(seed, 32, 16, torch.float32)
    experts_R = choices_of(seed, 40, 1).flatten().sort().values
    rows_RH = torch.cat([random(seed + 2, 40, 32), torch.full((9, 32), torch.nan)])
    counts_E = count_by_expert(experts_R, EXPERTS)
    found_RH = stacked_products(rows_RH, counts_E, experts)
    assert launches == ["_cut_rows_kernel", "_block_product_kernel", "_block_product_kernel"]
    gate_up, down = ([partial(multiply, each) for each in all_] for all_ in (experts.gate_up_EOH, experts.down_EHI))
    expected_RH = expert_products(rows_RH, counts_E, gate_up, down)
    assert found_RH.shape == expected_RH.shape
    torch.testing.assert_close(found_RH[:40], expected_RH[:40], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(("tokens", "chosen", "hidden"), [(1, 1, 1), (4, 3, 33), (2, 8, 1500), (0, 2, 8), (3, 2, 0)])
def test_sums_are_the_reference(
    tokens: int, chosen: int, hidden: int, dtype: torch.dtype, seed: int, launches: list[str]
) -> None:
    by_choice_TAH = random(seed, tokens, hidden, chosen, dtype=dtype).transpose(1, 2)
    weights_TA = random(seed + 1, chosen, tokens).T
    found_TH = weighted_sum(by_choice_TAH, weights_TA)
    # No product of float32 numbers is fused with an addition: the same bits.
    assert torch.equal(found_TH, weighted_sum_reference(by_choice_TAH, weights_TA))
    assert launches == (["_weighted_sum_kernel"] if found_TH.numel() else [])
    backends.use("torch")
    torch.testing.assert_close(weighted_sum(by_choice_TAH, weights_TA), found_TH, rtol=CLOSE[dtype], atol=1e-6)


def test_what_is_left_to_separate_products() -> None:
    experts = stacked(0, 32, 16, torch.float32)
    assert experts.can_multiply(torch.zeros(1, 32))
    assert not experts.can_multiply(torch.zeros(1, 32).bfloat16()), "another type"
    assert not stacked(0, 40, 16, torch.bfloat16).can_multiply(torch.zeros(1, 40).bfloat16()), "not aligned"
    assert not stacked(0, 32, 8, torch.bfloat16).can_multiply(torch.zeros(1, 32).bfloat16()), "not aligned"


def test_what_does_not_fit_is_named() -> None:
    x_TI, weights_EOI = torch.zeros(4, 16).bfloat16(), torch.zeros(3, 32, 16).bfloat16()
    experts_TA = torch.zeros(4, 1, dtype=torch.int64)
    multiply_masked = partial(masked_product, is_gated=True)
    with pytest.raises(ValueError, match="experts_TA must be int64"):
        multiply_masked(torch.zeros(33, 16).bfloat16(), weights_EOI, torch.zeros(33, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="experts_TA must be int64"):
        multiply_masked(x_TI, weights_EOI, experts_TA.int())
    with pytest.raises(ValueError, match="of 16-bit x_TI"):
        multiply_masked(x_TI.float(), weights_EOI.float(), experts_TA)
    with pytest.raises(ValueError, match=r"weights_EOI must be \[experts, outputs, 32\]"):
        multiply_masked(torch.zeros(4, 32).bfloat16(), weights_EOI, experts_TA)
    with pytest.raises(ValueError, match="weights_EOI and x_TI must be of one float type"):
        multiply_masked(x_TI, weights_EOI.half(), experts_TA)
    with pytest.raises(ValueError, match="weights_EOI must have gate and up"):
        multiply_masked(x_TI, torch.zeros(3, 31, 16).bfloat16(), experts_TA)
    with pytest.raises(ValueError, match="multiples of 16"):
        multiply_masked(x_TI, torch.zeros(3, 16, 16).bfloat16(), experts_TA)
    with pytest.raises(ValueError, match="do not divide"):
        multiply_masked(torch.zeros(3, 16).bfloat16(), weights_EOI, experts_TA)
    with pytest.raises(ValueError, match=r"biases_EO must be \[3, 32\]"):
        multiply_masked(x_TI, weights_EOI, experts_TA, biases_EO=torch.zeros(3, 16).bfloat16())
    with pytest.raises(ValueError, match="gate: gelu_tanh is not multiplied with in one launch"):
        multiply_masked(x_TI, weights_EOI, experts_TA, gate=Gate(kind=GateKind.GELU_TANH))
    with pytest.raises(ValueError, match="weights_TA"):
        weighted_sum(torch.zeros(2, 3, 4), torch.zeros(2, 2))
