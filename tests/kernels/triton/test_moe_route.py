"""The choice of experts: the kernel against its reference, the reference against transformers' routers."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from slipstream.kernels import backends
from slipstream.kernels.moe_route import Routing, Score, choose_experts, choose_experts_reference, route

PLAIN = Routing(top_k=2, normalize=True)
ROUTINGS = {
    "softmax": (8, PLAIN),
    "one of three": (3, Routing(top_k=1, normalize=False)),
    "all of them": (6, Routing(top_k=6, normalize=False, scaling=2.5)),
    "many experts": (300, Routing(top_k=9, normalize=True)),
    "sigmoid": (33, Routing(top_k=4, normalize=True, score=Score.SIGMOID, scaling=1.8)),
    "groups by their best": (60, Routing(top_k=6, normalize=False, groups=3, top_groups=2)),
    "groups by two": (
        64,
        Routing(top_k=8, normalize=True, score=Score.SIGMOID, groups=8, top_groups=4, sums_two=True, scaling=2.5),
    ),
    "large groups": (8 * 40, Routing(top_k=8, normalize=True, groups=8, top_groups=1)),
}


def logits_of(seed: int, tokens: int, experts: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((tokens, experts), generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ROUTINGS)
def test_kernel_is_the_reference(name: str, dtype: torch.dtype, seed: int, launches: list[str]) -> None:
    experts, routing = ROUTINGS[name]
    for tokens, biased in ((1, False), (5, True), (0, True)):
        logits_TE = logits_of(seed + tokens, tokens, experts, dtype)
        bias_E = logits_of(seed + 9, 1, experts)[0] / 4 if biased else None
        weights_TA, experts_TA = choose_experts_reference(logits_TE, routing, bias_E)
        found_TA, found_experts_TA = choose_experts(logits_TE, routing, bias_E)
        assert torch.equal(found_experts_TA, experts_TA)
        torch.testing.assert_close(found_TA, weights_TA, rtol=2e-6, atol=1e-7)
    assert launches == ["_choose_experts_kernel"] * 2


@pytest.mark.parametrize("name", ROUTINGS)
def test_torch_is_the_reference(name: str, seed: int, launches: list[str]) -> None:
    backends.use("torch")
    experts, routing = ROUTINGS[name]
    # Numbers of few bits: ties are common.
    logits_TE = logits_of(seed, 40, experts).mul(2).round()
    for bias_E in (None, torch.linspace(-1, 1, experts)):
        expected = choose_experts_reference(logits_TE, routing, bias_E)
        found = choose_experts(logits_TE, routing, bias_E)
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[0], expected[0])
    assert not launches


def test_of_equal_experts_the_first_is_chosen() -> None:
    logits_TE = torch.tensor([[1.0, 3.0, 1.0, 3.0, 0.0, 1.0], [0.0, -0.0, 0.0, -0.0, 0.0, 0.0]])
    for routing in (
        Routing(top_k=4, normalize=True),
        Routing(top_k=4, normalize=True, groups=3, top_groups=2, sums_two=True),
    ):
        _, experts_TA = choose_experts(logits_TE, routing)
        assert torch.equal(experts_TA, choose_experts_reference(logits_TE, routing)[1])
        assert experts_TA[1].tolist() == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_router_that_is_not_a_number_chooses_experts_that_there_are() -> None:
    logits_TE = torch.full((3, 6), torch.nan)
    for routing in (PLAIN, Routing(top_k=2, normalize=True, groups=3, top_groups=1)):
        weights_TA, experts_TA = choose_experts(logits_TE, routing)
        assert weights_TA.isnan().all()
        assert experts_TA.tolist() == [[0, 1]] * 3


@pytest.mark.parametrize("name", ["softmax", "groups by two"])
def test_a_token_is_routed_the_same_in_any_batch(name: str, seed: int) -> None:
    experts, routing = ROUTINGS[name]
    logits_TE = logits_of(seed, 9, experts, torch.bfloat16)
    weights_TA, experts_TA = choose_experts(logits_TE, routing)
    for first, last in ((0, 1), (3, 4), (8, 9), (2, 7)):
        found = choose_experts(logits_TE[first:last], routing)
        assert torch.equal(found[0], weights_TA[first:last])
        assert torch.equal(found[1], experts_TA[first:last])


@pytest.mark.parametrize("normalize", [False, True])
def test_reference_is_transformers_deepseek(normalize: bool, seed: int) -> None:
    config = DeepseekV3Config(
        hidden_size=24, num_local_experts=24, num_experts_per_tok=4, n_group=4, topk_group=2, norm_topk_prob=normalize,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    router = DeepseekV3TopkRouter(config)
    logits_TE, bias_E = logits_of(seed, 12, 24), logits_of(seed + 1, 1, 24)[0]
    # Its product with the identity leaves the logits as they are.
    torch.nn.init.eye_(router.weight)
    router.e_score_correction_bias.copy_(bias_E)
    _, weights_TA, experts_TA = router(logits_TE)
    routing = Routing(
        top_k=4, normalize=normalize, score=Score.SIGMOID, groups=4, top_groups=2, sums_two=True, scaling=2.5
    )
    found_TA, found_experts_TA = choose_experts_reference(logits_TE, routing, bias_E)
    # transformers leaves the order of the chosen open.
    order, expected_order = found_experts_TA.argsort(1), experts_TA.argsort(1)
    assert torch.equal(found_experts_TA.gather(1, order), experts_TA.gather(1, expected_order))
    torch.testing.assert_close(found_TA.gather(1, order), weights_TA.gather(1, expected_order))


def test_route_multiplies_and_chooses(seed: int) -> None:
    x_TH, gate_EH = logits_of(seed, 4, 16), logits_of(seed + 1, 8, 16)
    expected = choose_experts_reference(x_TH @ gate_EH.T, PLAIN)
    found = route(x_TH, gate_EH, top_k=2, normalize=True)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0])


@pytest.mark.parametrize(
    ("experts", "groups", "top_groups", "top_k", "said"),
    [
        (8, 3, 1, 1, "groups do not divide"),
        (8, 4, 1, 3, "more than the experts of 1 groups"),
        (4, 4, 2, 1, "two experts in each group"),
    ],
)
def test_what_does_not_fit_is_named(experts: int, groups: int, top_groups: int, top_k: int, said: str) -> None:
    routing = Routing(top_k=top_k, normalize=True, groups=groups, top_groups=top_groups, sums_two=True)
    with pytest.raises(ValueError, match=said):
        choose_experts(torch.zeros(2, experts), routing)


def test_a_routing_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k"):
        Routing(top_k=0, normalize=True)
    with pytest.raises(ValueError, match="top_groups"):
        Routing(top_k=1, normalize=True, groups=2, top_groups=3)
    for bias_E in (torch.zeros(3), torch.zeros(4, dtype=torch.float64)):
        with pytest.raises(ValueError, match="bias_E"):
            choose_experts(torch.zeros(2, 4), PLAIN, bias_E)
    with pytest.raises(ValueError, match="logits_TE"):
        choose_experts(torch.zeros(4), PLAIN)


@pytest.mark.parametrize(("is_normal", "top_k"), list(product([False, True], [1, 3])))
def test_reference_is_a_float64_formula(is_normal: bool, top_k: int, seed: int) -> None:
    logits_TE = logits_of(seed, 7, 10)
    odds_TE = logits_TE.double().exp()
    expected_TA = (odds_TE / odds_TE.sum(1, keepdim=True)).sort(1, descending=True).values[:, :top_k]
    if is_normal:
        expected_TA = expected_TA / expected_TA.sum(1, keepdim=True)
    weights_TA, _ = choose_experts_reference(logits_TE, Routing(top_k=top_k, normalize=is_normal))
    torch.testing.assert_close(weights_TA.double(), expected_TA, rtol=1e-5, atol=1e-7)
