"""Experts that fire together share hosts and ranks, and fewer rows move for it."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slipstream.benchmarks.expert_workloads import PlantedRouter
from slipstream.comm.expert_map import map_of
from slipstream.comm.expert_traffic import traffic
from slipstream.placement.expert_affinity import SLACK, group_experts, place_by_affinity
from slipstream.placement.expert_balance import balance_globally, rank_loads
from slipstream.placement.expert_counts import count_together
from slipstream.placement.experts import ExpertPlacement, round_robin
from slipstream.tests.placement.expert_cases import Problem, problems


@pytest.mark.parametrize(("experts", "groups", "num_slots"), [(64, 8, 64), (64, 4, 64), (64, 8, 80), (128, 16, 128)])
def test_planted_groups_move_far_fewer_bytes(experts: int, groups: int, num_slots: int, seed: int) -> None:
    ranks, per_host = 8, 2
    router = PlantedRouter(experts=experts, groups=groups, top_k=6, inside=0.9, seed=seed)
    learned = [token for rows in router.batch(ranks, 250) for token in rows]
    loads = [float(sum(expert in token for token in learned)) for expert in range(experts)]
    grouped = place_by_affinity(
        [count_together(learned, experts)], [loads], num_slots=num_slots, num_ranks=ranks, ranks_per_host=per_host
    )
    # Judged by tokens that it has not seen.
    choices = [torch.tensor(rows) for rows in router.batch(ranks, 100)]
    dealt = round_robin(experts, ranks, ranks_per_host=per_host)

    def moved(placement: ExpertPlacement, *sizes: int) -> list[int]:
        return [level.moved_rows for level in traffic(choices, map_of(placement, 0), sizes=sizes)]

    before, after = moved(dealt, 4, 2), moved(grouped, 4, 2)
    assert after[0] <= 0.7 * before[0]
    assert sum(after) <= 0.7 * sum(before)
    assert moved(grouped, 8)[0] <= 0.7 * moved(dealt, 8)[0]
    heaviest = max(rank_loads(grouped, 0, loads))
    balanced = balance_globally([loads], num_slots=num_slots, num_ranks=ranks)
    assert heaviest <= max(rank_loads(balanced, 0, loads)) * (1 + SLACK) ** 2 * 1.05


def test_hidden_groups_are_found_exactly(seed: int) -> None:
    draw = random.Random(seed)
    order = list(range(24))
    draw.shuffle(order)
    hidden = [sorted(order[first : first + 6]) for first in range(0, 24, 6)]
    together = [[0.0] * 24 for _ in range(24)]
    for one, other in itertools.product(range(24), repeat=2):
        same = any(one in group and other in group for group in hidden)
        together[one][other] = draw.uniform(8, 12) if same else draw.uniform(0, 3)
    assert sorted(group_experts(together, [1.0] * 24, 4)) == sorted(hidden)


@given(problem=problems(), seed=st.integers(0, 2**32), slack=st.sampled_from([0.0, 0.1, 1.0]))
def test_parts_are_equal_and_no_heavier_than_allowed(problem: Problem, seed: int, slack: float) -> None:
    draw = random.Random(seed)
    loads, parts = problem.loads[0], problem.num_groups
    together = [[float(draw.randrange(10)) for _ in loads] for _ in loads]
    found = group_experts(together, loads, parts, slack=slack)
    assert sorted(expert for part in found for expert in part) == list(range(len(loads)))
    assert {len(part) for part in found} == {len(loads) // parts}
    balanced = balance_globally([loads], num_slots=len(loads), num_ranks=parts)
    limit = max(rank_loads(balanced, 0, loads)) * (1 + slack)
    assert max(sum(loads[expert] for expert in part) for part in found) <= limit * (1 + 1e-9)
    assert group_experts(together, loads, parts, slack=slack) == found, "deterministic"


@given(problem=problems(), seed=st.integers(0, 2**32))
def test_replicas_stay_on_their_expert_s_host(problem: Problem, seed: int) -> None:
    draw = random.Random(seed)
    together = [[[float(draw.randrange(10)) for _ in layer] for _ in layer] for layer in problem.loads]
    found = place_by_affinity(
        together,
        problem.loads,
        num_slots=problem.num_slots,
        num_ranks=problem.num_ranks,
        ranks_per_host=problem.ranks_per_host,
    )
    assert (found.num_layers, found.num_slots) == (len(problem.loads), problem.num_slots)
    for experts in found.logical_to_physical:
        for slots in experts:
            assert len({found.host_of(found.rank_of(slot)) for slot in slots}) == 1


def inside(parts: Any, together: list[list[float]]) -> float:
    return sum(together[one][other] for part in parts for one, other in itertools.combinations(part, 2))


def test_tiny_groupings_come_near_the_best_possible(seed: int) -> None:
    draw = random.Random(seed)
    ratios = []
    for _ in range(20):
        together = [[0.0] * 8 for _ in range(8)]
        for one, other in itertools.combinations(range(8), 2):
            together[one][other] = together[other][one] = draw.expovariate(1)
        halves = [(half, set(range(8)).difference(half)) for half in itertools.combinations(range(8), 4)]
        best = max(inside(parts, together) for parts in halves)
        ratios.append(inside(group_experts(together, [1.0] * 8, 2), together) / best)
    assert max(ratios) < 1 + 1e-9, "nothing is better than the best"
    assert sum(ratios) / len(ratios) > 0.95


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_ranks": 8, "ranks_per_host": 1}, "ranks_per_host must give hosts that divide the 4 experts"),
        ({"num_slots": 10}, "num_slots must be a multiple of the 4 ranks, got 10"),
        ({"num_slots": 12}, "num_slots must be at most 4 experts times the 2 ranks of a host, got 12"),
        ({"together": []}, "together must have 1 layers as loads, got 0"),
        ({"together": [[[0.0] * 4] * 3]}, "together must be 4 by 4"),
        ({"slack": -0.1}, "slack must not be negative, got -0.1"),
        ({"loads": [[math.nan] * 4]}, r"loads\[0\] must be finite"),
    ],
)
def test_arguments_that_cannot_be_are_named(changed: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {
        "together": [[[1.0] * 4] * 4],
        "loads": [[1.0] * 4],
        "num_slots": 8,
        "num_ranks": 4,
        "ranks_per_host": 2,
    }
    with pytest.raises(ValueError, match=message):
        place_by_affinity(**(fields | changed))
