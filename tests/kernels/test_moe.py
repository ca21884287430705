"""Routing and experts against float64, token by token."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from slipstream.kernels.moe_mlp import Product, moe_mlp
from slipstream.kernels.moe_route import route

HIDDEN, INNER, EXPERTS = 16, 10, 6


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def products(weights: torch.Tensor) -> list[Product]:
    return [partial(multiply, weight) for weight in weights]


def multiply(weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def expected_mlp(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> np.ndarray:
    gate, up = np.split(gate_up.double().numpy() @ x.double().numpy(), 2)
    return down.double().numpy() @ (gate / (1 + np.exp(-gate)) * up)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_route_takes_the_most_likely_experts_first(seed: int, top_k: int, normalize: bool) -> None:
    x, gate = random(seed, 13, HIDDEN), random(seed + 1, EXPERTS, HIDDEN)
    logits = x.double().numpy() @ gate.double().numpy().T
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    order = np.argsort(-probabilities, axis=-1)[:, :top_k]
    chosen = np.take_along_axis(probabilities, order, -1)
    if normalize:
        chosen = chosen / chosen.sum(-1, keepdims=True)
    weights, experts = route(x, gate, top_k=top_k, normalize=normalize)
    assert np.array_equal(experts.numpy(), order)
    assert np.abs(weights.double().numpy() - chosen).max() < 1e-5


def test_route_weights_are_float32_for_half_precision(seed: int) -> None:
    x, gate = random(seed, 3, HIDDEN).bfloat16(), random(seed + 1, EXPERTS, HIDDEN).bfloat16()
    weights, _ = route(x, gate, top_k=2, normalize=True)
    assert weights.dtype == torch.float32
    assert (weights.sum(-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("tokens", [1, 2, 31])
@pytest.mark.parametrize("chosen", [1, 3])
def test_moe_mlp_is_the_weighted_sum_of_experts(seed: int, tokens: int, chosen: int) -> None:
    x = random(seed, tokens, HIDDEN)
    gate_up, down = (
        random(seed + 1, EXPERTS, 2 * INNER, HIDDEN) / 4,
        random(seed + 2, EXPERTS, HIDDEN, INNER) / 4,
    )
    draw = np.random.default_rng(seed)
    # Expert 4 is never chosen: an expert without tokens must not disturb the order.
    experts = np.stack([draw.choice([0, 1, 2, 3, 5], chosen, replace=False) for _ in range(tokens)])
    weights = torch.from_numpy(draw.random((tokens, chosen), dtype=np.float32))
    expected = np.zeros((tokens, HIDDEN))
    for token in range(tokens):
        for choice in range(chosen):
            expert = experts[token, choice]
            expected[token] += weights[token, choice].item() * expected_mlp(x[token], gate_up[expert], down[expert])
    found = moe_mlp(x, weights, torch.from_numpy(experts), products(gate_up), products(down))
    assert np.abs(found.double().numpy() - expected).max() < 1e-4


def test_moe_mlp_without_tokens() -> None:
    nothing = moe_mlp(
        torch.zeros(0, HIDDEN),
        torch.zeros(0, 2),
        torch.zeros(0, 2, dtype=torch.int64),
        products(torch.zeros(EXPERTS, 2 * INNER, HIDDEN)),
        products(torch.zeros(EXPERTS, HIDDEN, INNER)),
    )
    assert nothing.shape == (0, HIDDEN)
