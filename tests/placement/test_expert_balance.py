"""Loads become placements: what always holds, how good they are, and the best possible on tiny cases."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.benchmarks.expert_workloads import lognormal_loads, zipf_loads
from slipstream.placement.expert_balance import (
    balance_globally,
    balance_hierarchically,
    balancedness,
    rank_loads,
)
from slipstream.placement.expert_packing import even_out, pack, replica_counts
from slipstream.placement.experts import ExpertPlacement, round_robin
from slipstream.tests.placement.expert_cases import Problem, problems


def place(problem: Problem, policy: str) -> ExpertPlacement:
    shape = {
        "num_slots": problem.num_slots,
        "num_ranks": problem.num_ranks,
        "ranks_per_host": problem.ranks_per_host,
    }
    if policy == "global":
        return balance_globally(problem.loads, **shape)
    return balance_hierarchically(problem.loads, num_groups=problem.num_groups, **shape)


@pytest.mark.parametrize("policy", ["global", "hierarchical"])
@given(problem=problems())
def test_placements_are_whole_and_conserve_loads(policy: str, problem: Problem) -> None:
    # That every expert has a slot, ranks have equally many and none holds an expert twice, the value itself refuses.
    placement = place(problem, policy)
    assert (placement.num_slots, placement.num_ranks) == (problem.num_slots, problem.num_ranks)
    assert placement.num_layers == len(problem.loads)
    for layer, loads in enumerate(problem.loads):
        ranks = rank_loads(placement, layer, loads)
        assert sum(ranks) == pytest.approx(sum(loads))
        assert max(ranks) >= sum(loads) / problem.num_ranks * (1 - 1e-9)
    assert 0 < balancedness(placement, problem.loads) <= 1 + 1e-9
    assert place(problem, policy) == placement, "deterministic"


@given(problem=problems())
def test_hierarchical_keeps_groups_on_hosts(problem: Problem) -> None:
    placement = place(problem, "hierarchical")
    size = problem.num_experts // problem.num_groups
    for layer in range(placement.num_layers):
        hosts: dict[int, set[int]] = {}
        for rank, experts in enumerate(placement.experts_by_rank(layer)):
            for expert in experts:
                hosts.setdefault(expert // size, set()).add(placement.host_of(rank))
        assert all(len(own) == 1 for own in hosts.values()), hosts
        counts = Counter(host for own in hosts.values() for host in own)
        assert set(counts.values()) == {problem.num_groups // placement.num_hosts}


@given(
    loads=st.lists(st.floats(0, 1e6), min_size=1, max_size=12),
    most=st.integers(1, 5),
    part=st.floats(0, 1),
)
def test_spare_slots_go_to_the_heaviest_replicas(loads: list[float], most: int, part: float) -> None:
    slots = len(loads) + int(part * (most - 1) * len(loads))
    counts = replica_counts(loads, slots, most=most)
    assert sum(counts) == slots
    assert all(1 <= count <= most for count in counts)
    # No replica taken from one expert and given to another makes the heaviest replica lighter.
    growing = [load / count for load, count in zip(loads, counts, strict=True) if count < most]
    shrunk = [load / (count - 1) for load, count in zip(loads, counts, strict=True) if count > 1]
    assert not growing or not shrunk or max(growing) <= min(shrunk)


def test_layers_without_load_are_replicated_evenly() -> None:
    assert replica_counts([0.0] * 4, 10, most=4) == [3, 3, 2, 2]


def test_packing_makes_way_when_only_bins_with_the_owner_have_room() -> None:
    # Owner 2's replicas come last and find room twice on one bin: something there has to change places.
    loads = [9.0, 1.5, 1.5, 1.5, 1.0, 1.0]
    owners = [0, 1, 3, 4, 2, 2]
    bins = pack(loads, owners, 2, target=1.0)
    assert sorted(item for items in bins for item in items) == list(range(6))
    assert all(2 in {owners[item] for item in items} for items in bins)


@given(
    owners=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    num_bins=st.integers(1, 6),
    data=st.data(),
)
def test_packing_never_puts_an_owner_twice_into_a_bin(owners: list[int], num_bins: int, data: st.DataObject) -> None:
    # Any owners with at most as many items as bins, filled up with others to a multiple.
    items = [owner for owner, count in Counter(owners).items() for _ in range(min(count, num_bins))]
    items += range(100, 100 + -len(items) % num_bins)
    loads = data.draw(st.lists(st.integers(0, 9), min_size=len(items), max_size=len(items)))
    bins = pack([float(load) for load in loads], items, num_bins, target=1.0)
    assert sorted(item for own in bins for item in own) == list(range(len(items)))
    for own in bins:
        assert len(own) == len(items) // num_bins
        assert len({items[item] for item in own}) == len(own)


def test_exchanges_of_two_where_one_does_not_help() -> None:
    # 18 against 16: no exchange of one item makes the heavier lighter, one of (8, 1) for (5, 3) does.
    loads = [8.0, 1.0, 8.0, 1.0, 5.0, 3.0, 5.0, 3.0]
    bins = [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert even_out(bins, loads, range(8), limit=17.0) == 17.0
    assert sorted(item for items in bins for item in items) == list(range(8))
    assert [sorted(loads[item] for item in items) for items in bins] == [[1, 3, 5, 8]] * 2


@pytest.mark.parametrize(("num_ranks", "wanted"), [(32, 0.94), (72, 0.98)])
def test_balance_of_a_large_model(num_ranks: int, wanted: float, seed: int) -> None:
    loads = lognormal_loads(58, 256, seed=seed)
    placement = balance_globally(loads, num_slots=288, num_ranks=num_ranks, ranks_per_host=8)
    assert balancedness(placement, loads) >= wanted


def test_balance_of_a_large_model_with_groups_on_hosts(seed: int) -> None:
    # Eight groups on four hosts bound what can be reached: the hosts' own imbalance is not the packing's to mend.
    loads = lognormal_loads(10, 256, seed=seed)
    placement = balance_hierarchically(loads, num_slots=288, num_ranks=32, ranks_per_host=8, num_groups=8)
    for layer, own in enumerate(loads):
        ranks = rank_loads(placement, layer, own)
        for host in range(4):
            inside = ranks[host * 8 : host * 8 + 8]
            assert sum(inside) / 8 / max(inside) >= 0.94
    assert balancedness(placement, loads) > balancedness(round_robin(256, 32, num_layers=10), loads)


def test_hot_experts_have_replicas_and_places_chosen_together() -> None:
    # One expert with a quarter of all load: with replicas chosen first, places alone reach 0.91.
    loads = zipf_loads(1, 256, seed=0, exponent=1.2)
    placement = balance_globally(loads, num_slots=320, num_ranks=64)
    assert balancedness(placement, loads) >= 0.94


def best_possible(loads: list[float], num_ranks: int, slots_per_rank: int) -> float:
    """Try every placement and return the load of the heaviest rank of the best."""
    best = math.inf
    experts = range(len(loads))
    for ranks in itertools.combinations_with_replacement(itertools.combinations(experts, slots_per_rank), num_ranks):
        counts = Counter(expert for own in ranks for expert in own)
        if len(counts) == len(loads):
            best = min(best, max(sum(loads[expert] / counts[expert] for expert in own) for own in ranks))
    return best


@pytest.mark.parametrize(
    ("experts", "num_ranks", "slots_per_rank"), [(4, 2, 2), (6, 2, 3), (5, 2, 3), (6, 3, 2), (6, 3, 3), (5, 4, 2)]
)
def test_tiny_cases_come_near_the_best_possible(experts: int, num_ranks: int, slots_per_rank: int, seed: int) -> None:
    draw = random.Random(seed)
    ratios = []
    for _ in range(20):
        loads = [draw.lognormvariate(0, 1) for _ in range(experts)]
        slots = num_ranks * slots_per_rank
        placement = balance_globally([loads], num_slots=slots, num_ranks=num_ranks, target=1.0)
        ratios.append(max(rank_loads(placement, 0, loads)) / best_possible(loads, num_ranks, slots_per_rank))
    assert min(ratios) > 1 - 1e-9, "nothing is better than the best"
    assert sum(ratios) / len(ratios) < 1.08
    if slots == experts:
        assert sum(ratio < 1 + 1e-9 for ratio in ratios) > 10, "without replicas mostly the best itself"
        assert sum(ratios) / len(ratios) < 1.02


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loads": []}, "loads must have at least one layer and one expert"),
        ({"loads": [[]]}, "loads must have at least one layer and one expert"),
        ({"loads": [[1.0] * 8, [1.0] * 7]}, r"loads\[1\] must be of 8 experts"),
        ({"loads": [[1.0] * 7 + [-1.0]]}, r"loads\[0\] must be finite and not negative"),
        ({"loads": [[1.0] * 7 + [math.inf]]}, r"loads\[0\] must be finite and not negative"),
        ({"loads": [[1.0] * 7 + [math.nan]]}, r"loads\[0\] must be finite and not negative"),
        ({"num_slots": 4}, "num_slots must be at least the 8 experts, got 4"),
        ({"num_slots": 10}, "num_slots must be a multiple of the 4 ranks, got 10"),
        ({"num_slots": 36}, "num_slots must be at most 8 experts times 4 ranks, got 36"),
        ({"num_slots": 20}, "num_slots must be at most 8 experts times the 2 ranks of a host, got 20"),
        ({"num_ranks": 0}, "num_ranks must be at least 1, got 0"),
        ({"ranks_per_host": 3}, "ranks_per_host must divide the 4 ranks, got 3"),
        ({"num_groups": 3}, "num_groups must divide the 8 experts, got 3"),
        ({"num_groups": 1}, "num_groups must be a multiple of the 2 hosts, got 1"),
        ({"target": 0.0}, "target must be above 0 and at most 1, got 0.0"),
    ],
)
def test_arguments_that_cannot_be_are_named(changed: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {
        "loads": [[1.0] * 8],
        "num_slots": 8,
        "num_ranks": 4,
        "ranks_per_host": 2,
        "num_groups": 4,
    }
    arguments = fields | changed
    with pytest.raises(ValueError, match=message):
        balance_hierarchically(arguments.pop("loads"), **arguments)


def test_loads_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="loads must be 2 layers of 4 experts"):
        balancedness(round_robin(4, 2, num_layers=2), [[1.0] * 4])
    with pytest.raises(ValueError, match="num_slots must be 2 to 4, got 5"):
        replica_counts([1.0, 1.0], 5, most=2)


def test_balancedness_by_hand() -> None:
    placement = ExpertPlacement.of_ranks([[(0, 1), (0, 2)]] * 2, num_experts=3, ranks_per_host=2)
    assert rank_loads(placement, 0, [4.0, 1.0, 3.0]) == [3.0, 5.0]
    assert balancedness(placement, [[4.0, 1.0, 3.0], [0.0, 0.0, 0.0]]) == pytest.approx((4 / 5 + 1) / 2)
