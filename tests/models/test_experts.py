"""A rank's experts: stacked where kernels multiply, never kept twice, and the same function in every form."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from slipstream.kernels import backends
from slipstream.kernels.gate import Gate, GateKind
from slipstream.kernels.launch import HAS_TRITON, observed_launches
from slipstream.kernels.moe_sort import count_by_expert
from slipstream.runtime.models.experts import Experts, SlotProducts
from slipstream.runtime.models.linear import Biased
from slipstream.runtime.models.linear_format import PlainFormat, PlainProduct

EXPERTS, HIDDEN, INNER = 4, 32, 16


@pytest.fixture(autouse=True)
def _by_triton() -> Iterator[None]:
    if not HAS_TRITON:
        pytest.skip("no Triton here: pip install triton")
    backends.use("triton")
    yield
    backends.use("auto")


def weights_of(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    gate_up, down = (EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)
    return torch.randn(gate_up, generator=draw) / 4, torch.randn(down, generator=draw) / 4


def slots_of(weights: tuple[Tensor, Tensor], order: list[int] | None = None) -> list[SlotProducts]:
    prepare = PlainFormat().prepare
    gate_up, down = ([prepare(weight) for weight in one] for one in weights)
    return [(gate_up[place], down[place]) for place in order or range(EXPERTS)]


def addresses(slots: tuple[SlotProducts, ...]) -> list[tuple[int, int]]:
    found = []
    for gate_up, down in slots:
        assert isinstance(gate_up, PlainProduct) and isinstance(down, PlainProduct)
        found.append((gate_up.weight_OI.data_ptr(), down.weight_OI.data_ptr()))
    return found


def test_weights_that_were_loaded_together_are_not_copied(seed: int) -> None:
    gate_up, down = weights = weights_of(seed)
    experts = Experts(slots_of(weights))
    assert addresses(experts.slots) == [
        (one.data_ptr(), other.data_ptr()) for one, other in zip(gate_up, down, strict=True)
    ]


def test_weights_that_lie_elsewhere_are_copied_and_the_copy_is_kept(seed: int) -> None:
    gate_up, down = weights = weights_of(seed)
    order = [2, 0, 0, 3]
    experts = Experts(slots_of(weights, order))
    held = addresses(experts.slots)
    steps = {(later[0] - one[0], later[1] - one[1]) for one, later in pairwise(held)}
    assert steps == {(gate_up[0].nbytes, down[0].nbytes)}, "one behind the other"
    for (found, found_down), expert in zip(experts.slots, order, strict=True):
        assert isinstance(found, PlainProduct) and isinstance(found_down, PlainProduct)
        assert torch.equal(found.weight_OI, gate_up[expert])
        assert torch.equal(found_down.weight_OI, down[expert])
    assert addresses(Experts(experts.slots).slots) == held, "not again"


def test_both_forms_compute_the_same(seed: int) -> None:
    weights = weights_of(seed)
    draw = torch.Generator().manual_seed(seed + 1)
    x_TH = torch.randn((5, HIDDEN), generator=draw)
    experts_TA = torch.stack([torch.randperm(EXPERTS, generator=draw)[:2] for _ in range(5)])
    weights_TA = torch.rand((5, 2), generator=draw)
    sorted_R = experts_TA.flatten().sort().values
    counts_S, rows_RH = count_by_expert(sorted_R, EXPERTS), x_TH.repeat(2, 1)
    launched: list[str] = []
    results = []
    for way in ("triton", "torch"):
        backends.use(way)
        with observed_launches(lambda kernel, *_: launched.append(kernel.__name__)):
            experts = Experts(slots_of(weights))
            results.append((experts.mlp(x_TH, weights_TA, experts_TA), experts.products(rows_RH, counts_S)))
        if way == "triton":
            assert launched.count("_block_product_kernel") == 4
            launched.clear()
    assert not launched
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_down_biases", [True, False])
def test_biases_and_gates_are_stacked_too(has_down_biases: bool, seed: int) -> None:
    """A rank of several that divide the columns has no last biases, but for one."""
    draw = torch.Generator().manual_seed(seed + 1)
    gate_up_biases, down_biases = torch.randn((2, EXPERTS, 2 * INNER), generator=draw)
    slots: list[SlotProducts] = [
        (Biased(gate_up, bias), Biased(down, other) if has_down_biases else down)
        for (gate_up, down), bias, other in zip(
            slots_of(weights_of(seed)), gate_up_biases, down_biases[:, :HIDDEN], strict=True
        )
    ]
    rows_RH, counts_S = torch.randn((10, HIDDEN), generator=draw), torch.tensor([3, 0, 5, 2])
    gate = Gate(kind=GateKind.CLAMPED, alpha=1.702, limit=0.7)
    launched: list[str] = []
    with observed_launches(lambda kernel, *_: launched.append(kernel.__name__)):
        experts = Experts(slots, gate)
        found = experts.products(rows_RH, counts_S)
    assert launched.count("_block_product_kernel") == 2
    backends.use("torch")
    for each in (Experts(slots, gate), Experts(experts.slots, gate)):
        torch.testing.assert_close(found, each.products(rows_RH, counts_S), rtol=1e-5, atol=1e-5)


def test_products_of_another_kind_stay_as_they_are(seed: int) -> None:
    slots = slots_of(weights_of(seed))
    slots[1] = (lambda x_TI, bias_O: x_TI.repeat(1, 1)[:, :1].repeat(1, 2 * INNER), slots[1][1])
    experts = Experts(slots)
    assert experts.slots == tuple(slots)
    rows_RH = torch.ones(3, HIDDEN)
    assert experts.products(rows_RH, torch.tensor([0, 3, 0, 0])).shape == (3, HIDDEN)
