"""Which placement is next: by both policies, with and without hosts, and only where it gains."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.benchmarks.expert_workloads import PlantedRouter, lognormal_loads
from slipstream.placement.expert_balance import balancedness, rank_loads
from slipstream.placement.expert_counts import count_together
from slipstream.placement.expert_plan import first_placement, keeps_replicas_on_hosts, next_placement
from slipstream.placement.experts import ExpertPlacement
from slipstream.tests.placement.expert_cases import Problem, problems


def of_layers(first: ExpertPlacement, layers: int) -> ExpertPlacement:
    return ExpertPlacement.of_ranks(
        [first.experts_by_rank(0)] * layers, num_experts=first.num_experts, ranks_per_host=first.ranks_per_host
    )


@pytest.mark.parametrize("spare", [0, 1, 5, 100])
@pytest.mark.parametrize(("ranks", "per_host"), [(1, 1), (4, 4), (4, 2), (6, 2), (4, 1), (3, 3)])
@pytest.mark.parametrize("experts", [6, 8, 12])
def test_the_first_placement_has_room_and_keeps_replicas_on_hosts(
    experts: int, ranks: int, per_host: int, spare: int
) -> None:
    first = first_placement(experts, ranks, ranks_per_host=per_host, spare_slots=spare)
    assert (first.num_ranks, first.ranks_per_host, first.num_experts) == (ranks, per_host, experts)
    hosts = ranks // per_host
    most = experts * (per_host if experts % hosts == 0 else ranks)
    assert first.num_slots == min(-(-(experts + spare) // ranks) * ranks, most)
    assert keeps_replicas_on_hosts(first) == (hosts > 1 and experts % hosts == 0)


def test_one_host_deals_in_turn() -> None:
    first = first_placement(4, 2, ranks_per_host=2, spare_slots=2)
    assert first.experts_by_rank(0) == [(0, 2, 1), (1, 3, 0)]
    by_host = first_placement(8, 4, ranks_per_host=2, spare_slots=0)
    assert by_host.experts_by_rank(0) == [(0, 4), (2, 6), (1, 5), (3, 7)]


@given(problem=problems(), seed=st.integers(0, 2**32))
def test_any_loads_and_pairs_have_a_next_placement(problem: Problem, seed: int) -> None:
    experts, layers = problem.num_experts, len(problem.loads)
    first = first_placement(
        experts,
        problem.num_ranks,
        ranks_per_host=problem.ranks_per_host,
        spare_slots=problem.num_slots - experts,
    )
    present = of_layers(first, layers)
    draw = random.Random(seed)
    pairs = [[[float(draw.randrange(5)) for _ in range(experts)] for _ in range(experts)] for _ in range(layers)]
    for found in (
        next_placement(present, problem.loads),
        next_placement(present, problem.loads, pairs=pairs.__getitem__),
    ):
        after = found.placement
        assert (after.num_layers, after.num_slots, after.ranks_per_host) == (
            layers,
            present.num_slots,
            present.ranks_per_host,
        )
        assert keeps_replicas_on_hosts(after) == keeps_replicas_on_hosts(present)
        for layer in range(layers):
            for rank in range(present.num_ranks):
                old, new = present.experts_on(layer, rank), after.experts_on(layer, rank)
                assert all(now == was for was, now in zip(old, new, strict=True) if was in new), "what stays, stays"


@pytest.mark.parametrize("per_host", [8, 2])
def test_loads_are_balanced_on_hosts_too(per_host: int, seed: int) -> None:
    loads = lognormal_loads(3, 32, seed=seed, sigma=0.7)
    present = of_layers(first_placement(32, 8, ranks_per_host=per_host, spare_slots=8), 3)
    after = next_placement(present, loads).placement
    assert balancedness(after, loads) > max(0.85, balancedness(present, loads))
    assert next_placement(after, loads).moves == (), "nothing is left to gain"


def planted(experts: int, seed: int) -> tuple[list[list[float]], list[list[int]]]:
    router = PlantedRouter(experts=experts, groups=experts // 4, top_k=3, inside=0.95, seed=seed)
    tokens = [token for rows in router.batch(1, 2000) for token in rows]
    loads = [float(sum(expert in token for token in tokens)) for expert in range(experts)]
    return [loads], count_together(tokens, experts)


@pytest.mark.parametrize("per_host", [4, 2])
def test_what_fires_together_is_brought_together_once(per_host: int, seed: int) -> None:
    loads, pairs = planted(16, seed)
    present = first_placement(16, 4, ranks_per_host=per_host, spare_slots=0)
    change = next_placement(present, loads, pairs=lambda layer: pairs)

    def apart(placement: ExpertPlacement) -> float:
        home = {expert: rank for rank, held in enumerate(placement.experts_by_rank(0)) for expert in held}
        return sum(pairs[one][two] for one in home for two in home if home[one] != home[two])

    assert apart(change.placement) < 0.4 * apart(present)
    assert change.moves
    heaviest = max(rank_loads(change.placement, 0, loads[0]))
    assert heaviest <= sum(loads[0]) / 4 * 1.25
    # The same again, and a little noise, move nothing.
    noisy = [[count + (one * other) % 3 for other, count in enumerate(row)] for one, row in enumerate(pairs)]
    assert next_placement(change.placement, loads, pairs=lambda layer: noisy).moves == ()


def test_experts_that_nobody_chooses_together_stay(seed: int) -> None:
    loads = [[1.0] * 8]
    present = first_placement(8, 4, ranks_per_host=4, spare_slots=0)
    none = [[0.0] * 8 for _ in range(8)]
    assert next_placement(present, loads, pairs=lambda layer: none).moves == ()
