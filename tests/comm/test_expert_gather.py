"""Experts' rows gathered by ranks that have all tokens: the bits of the exchange, and of one rank."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import Tensor

from slipstream.comm.collectives import Collectives
from slipstream.comm.errors import CommMisuse
from slipstream.comm.expert_gather import mix_gathered, share_of
from slipstream.comm.expert_map import ExpertMap, even_map
from slipstream.comm.experts import mix
from slipstream.comm.overlap import run_plain
from slipstream.tests.fakes.expert_ranks import (
    HIDDEN,
    Experts,
    LocalLevels,
    Tokens,
    make_experts,
    make_tokens,
    replicated,
)

EXPERTS = 10
LEVELS = [(1,), (2,), (3,), (4,), (2, 2), (2, 1), (1, 3), (2, 3)]
LIKELY = 0.7 ** torch.arange(EXPERTS)
"""Some experts of many tokens, and some of none."""


def gathered(groups: LocalLevels, whole: Tokens, placed: ExpertMap, experts: Experts) -> list[Tensor]:
    def body(rank: int, levels: list[Collectives]) -> Tensor:
        own = share_of(len(whole.x), rank, groups.ranks)
        steps = mix_gathered(
            levels,
            whole.x,
            whole.weights[own],
            whole.experts[own],
            placed=placed,
            products=experts.of_rank(placed, rank),
        )
        return run_plain(steps)

    return groups.run(body)


def exchanged(groups: LocalLevels, whole: Tokens, placed: ExpertMap, experts: Experts) -> Tensor:
    def body(rank: int, levels: list[Collectives]) -> Tensor:
        own = share_of(len(whole.x), rank, groups.ranks)
        products = experts.of_rank(placed, rank)
        parts = whole.x[own], whole.weights[own], whole.experts[own]
        return run_plain(mix(levels, *parts, placed=placed, products=products)).output_TH

    return torch.cat(groups.run(body))


@pytest.mark.parametrize("count", [1, 2, 7, 18])
def test_shares_are_even_and_all_there_is(count: int) -> None:
    for ranks in range(1, 8):
        shares = [list(range(count))[share_of(count, rank, ranks)] for rank in range(ranks)]
        assert [token for share in shares for token in share] == list(range(count))
        assert len(shares[0]) == max(map(len, shares)) == -(-count // ranks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("sizes", LEVELS)
def test_the_bits_of_one_rank_and_of_the_exchange(
    sizes: tuple[int, ...], top_k: int, dtype: torch.dtype, seed: int
) -> None:
    """Experts' results depend on their rows' company here, so the order of rows is that of one rank, too."""
    ranks = prod(sizes)
    experts, groups = make_experts(seed, EXPERTS, dtype=dtype), LocalLevels(sizes)
    for count in (1, 2, 7, 18):
        (whole,) = make_tokens(seed + count, (count,), LIKELY, top_k=top_k, dtype=dtype)
        expected = experts.on_one_rank(whole.x, whole.weights, whole.experts)
        for found in gathered(groups, whole, even_map(EXPERTS, ranks=ranks), experts):
            assert torch.equal(found, expected)
        # With replicas rows have other company than on one rank, and the same as in the exchange.
        placed = replicated(seed + count, EXPERTS, ranks)
        expected = exchanged(groups, whole, placed, experts)
        for found in gathered(groups, whole, placed, experts):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("sizes", [(4,), (2, 2)])
def test_what_travels_is_the_choices_and_each_row(sizes: tuple[int, ...], seed: int) -> None:
    groups, placed, tokens, top_k = LocalLevels(sizes), even_map(EXPERTS, ranks=4), 7, 3
    (whole,) = make_tokens(seed, (tokens,), LIKELY, top_k=top_k, dtype=torch.float32)
    gathered(groups, whole, placed, make_experts(seed, EXPERTS))
    rows = (whole.experts.flatten() // placed.slots_per_rank).bincount(minlength=4)
    choices = 2 * (2 * top_k + 1) * 4
    for source in range(4):
        for to in range(4):
            reached = source != to and (len(sizes) == 1 or source % 2 == to % 2)
            expected = choices + int(rows[source]) * HIDDEN * 4 if reached else 0
            assert groups.sent(0)[source, to] == expected, "each row once to each rank, or to each host"


def test_ranks_with_different_maps_find_out_before_a_row_is_sent(seed: int) -> None:
    (whole,) = make_tokens(seed, (6,), LIKELY, top_k=2, dtype=torch.float32)
    experts, groups = make_experts(seed, EXPERTS), LocalLevels((3,))
    maps = [replicated(seed + (rank == 2), EXPERTS, 3) for rank in range(3)]

    def body(rank: int, levels: list[Collectives]) -> str:
        own = share_of(6, rank, 3)
        products = experts.of_rank(maps[rank], rank)
        parts = whole.x, whole.weights[own], whole.experts[own]
        with pytest.raises(CommMisuse) as error:
            run_plain(mix_gathered(levels, *parts, placed=maps[rank], products=products))
        return str(error.value)

    for message in groups.run(body):
        assert "a rank uses another map of experts; switch maps on all ranks" in message
    assert groups.sent(0).max() == 2 * (2 * 2 + 1) * 4, "the choices, and nothing else"


def test_operands_that_do_not_fit_are_named(seed: int) -> None:
    groups, placed, experts = LocalLevels((1,)), even_map(EXPERTS, ranks=1), make_experts(seed, EXPERTS)
    (whole,) = make_tokens(seed, (3,), LIKELY, top_k=2, dtype=torch.float32)

    def failed(weights: Tensor, placed: ExpertMap, cut: int) -> str:
        def body(rank: int, levels: list[Collectives]) -> str:
            plain = experts.of_rank(even_map(EXPERTS, ranks=1), 0)
            steps = mix_gathered(
                levels,
                whole.x,
                weights,
                whole.experts,
                placed=placed,
                products=lambda rows, counts: plain(rows, counts)[cut:],
            )
            with pytest.raises(CommMisuse) as error:
                run_plain(steps)
            return str(error.value)

        return groups.run(body)[0]

    assert "the map of experts is for 2 ranks, the levels have 1" in failed(
        whole.weights, even_map(EXPERTS, ranks=2), 0
    )
    assert "3 tokens need weights and experts [3, chosen]" in failed(whole.weights[1:], placed, 0)
    assert "the experts made 5 rows of 6; one each is due" in failed(whole.weights, placed, 1)
