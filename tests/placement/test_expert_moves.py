"""From one placement to the next: few moves, each from a rank that has the expert, and a balance near the wanted."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.benchmarks.expert_workloads import drifted, lognormal_loads
from slipstream.placement.expert_balance import balance_globally, balance_hierarchically, rank_loads
from slipstream.placement.expert_moves import Move, Rebalance, moves_between, rebalance
from slipstream.placement.experts import ExpertPlacement, round_robin
from slipstream.tests.placement.expert_cases import Problem, problems


def held_after(before: ExpertPlacement, moves: tuple[Move, ...], after: ExpertPlacement) -> None:
    """Check that the moves, each from a rank that has the expert, bring every rank what it lacks and nothing else."""
    arrived = Counter((move.layer, move.destination, move.expert) for move in moves)
    assert set(arrived.values()) <= {1}
    lacking = {
        (layer, rank, expert)
        for layer in range(before.num_layers)
        for rank in range(before.num_ranks)
        for expert in set(after.experts_on(layer, rank)).difference(before.experts_on(layer, rank))
    }
    assert set(arrived) == lacking
    for move in moves:
        assert move.expert in before.experts_on(move.layer, move.source)
        assert after.physical_to_logical[move.layer][move.slot] == move.expert
        assert after.rank_of(move.slot) == move.destination != move.source


@given(problem=problems(), seed=st.integers(0, 2**32), tolerance=st.sampled_from([0.0, 0.05, 0.5]))
def test_the_result_is_as_balanced_as_promised(problem: Problem, seed: int, tolerance: float) -> None:
    shape: dict[str, Any] = {
        "num_slots": problem.num_slots,
        "num_ranks": problem.num_ranks,
        "ranks_per_host": problem.ranks_per_host,
    }
    draw = random.Random(seed)
    present = balance_globally([draw.sample(layer, len(layer)) for layer in problem.loads], **shape)
    wanted = balance_globally(problem.loads, **shape)
    found = rebalance(present, wanted, problem.loads, tolerance=tolerance)
    held_after(present, found.moves, found.placement)
    assert len(found.moves) <= len(moves_between(present, wanted))
    for layer, loads in enumerate(problem.loads):
        limit = max(rank_loads(wanted, layer, loads)) * (1 + tolerance)
        assert max(rank_loads(found.placement, layer, loads)) <= limit * (1 + 1e-9)
        for rank in range(present.num_ranks):
            old, new = present.experts_on(layer, rank), found.placement.experts_on(layer, rank)
            assert all(now == was for was, now in zip(old, new, strict=True) if was in new), "what stays keeps its slot"
    assert rebalance(present, wanted, problem.loads, tolerance=tolerance) == found, "deterministic"


@given(problem=problems(), seed=st.integers(0, 2**32))
def test_groups_stay_on_hosts_where_asked(problem: Problem, seed: int) -> None:
    shape: dict[str, Any] = {
        "num_slots": problem.num_slots,
        "num_ranks": problem.num_ranks,
        "ranks_per_host": problem.ranks_per_host,
        "num_groups": problem.num_groups,
    }
    draw = random.Random(seed)
    present = balance_hierarchically([draw.sample(layer, len(layer)) for layer in problem.loads], **shape)
    wanted = balance_hierarchically(problem.loads, **shape)
    found = rebalance(present, wanted, problem.loads, inside_hosts=True)
    held_after(present, found.moves, found.placement)
    size = problem.num_experts // problem.num_groups
    for layer in range(found.placement.num_layers):
        hosts: dict[int, set[int]] = {}
        for rank, experts in enumerate(found.placement.experts_by_rank(layer)):
            for expert in experts:
                hosts.setdefault(expert // size, set()).add(found.placement.host_of(rank))
        assert all(len(own) == 1 for own in hosts.values())


def moved(present: ExpertPlacement, loads: list[list[float]], *, tolerance: float) -> tuple[Rebalance, int]:
    wanted = balance_globally(loads, num_slots=present.num_slots, num_ranks=present.num_ranks, ranks_per_host=8)
    return rebalance(present, wanted, loads, tolerance=tolerance), len(moves_between(present, wanted))


def test_small_drift_moves_little(seed: int) -> None:
    loads = lognormal_loads(4, 128, seed=seed)
    present = balance_globally(loads, num_slots=144, num_ranks=16, ranks_per_host=8)
    # Loads as they were: nothing to gain, nothing moves, whatever the tolerance.
    assert moved(present, loads, tolerance=0.0)[0] == Rebalance(placement=present, moves=())
    new = drifted(loads, sigma=0.2, seed=seed)
    few, many = moved(present, new, tolerance=0.05)
    assert 0 < len(few.moves) < many / 4
    fewer, _ = moved(present, new, tolerance=0.15)
    assert len(fewer.moves) <= len(few.moves)


def test_a_gain_below_the_tolerance_moves_nothing() -> None:
    present = ExpertPlacement.of_ranks([[(0, 1), (2, 3)]], num_experts=4, ranks_per_host=2)
    # 6.2 and 5.8, where 6 and 6 could be.
    loads = [[3.2, 3.0, 3.0, 2.8]]
    wanted = balance_globally(loads, num_slots=4, num_ranks=2, target=1.0)
    assert rebalance(present, wanted, loads, tolerance=0.1).moves == ()
    assert len(rebalance(present, wanted, loads, tolerance=0.01).moves) == 2


def test_ranks_are_renamed_rather_than_moved() -> None:
    present = ExpertPlacement.of_ranks([[(0, 1), (2, 3), (4, 5), (6, 7)]], num_experts=8, ranks_per_host=2)
    # The same four sets of experts under other names, and hosts that changed places.
    wanted = ExpertPlacement.of_ranks([[(7, 6), (4, 5), (2, 3), (1, 0)]], num_experts=8, ranks_per_host=2)
    assert len(moves_between(present, wanted)) == 8
    loads = [[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]
    assert rebalance(present, wanted, loads).moves == ()


def test_a_spare_replica_is_written_over() -> None:
    # Expert 0 has cooled and 3 is hot: one replica travels, from the only rank that has it.
    present = ExpertPlacement.of_ranks([[(0, 1), (0, 2), (3, 4)]], num_experts=5, ranks_per_host=3)
    loads = [[1.0, 2.0, 2.0, 6.0, 0.5]]
    wanted = balance_globally(loads, num_slots=6, num_ranks=3, target=1.0)
    found = rebalance(present, wanted, loads, tolerance=0.3)
    assert len(found.moves) == 1
    move = found.moves[0]
    assert (move.expert, move.source) == (3, 2)


def test_sources_are_near_and_share_the_work() -> None:
    # Both hosts hold expert 0 once, ranks 1 and 3 want it; expert 1 comes from the other host.
    before = ExpertPlacement.of_ranks([[(0,), (1,), (0,), (2,)]], num_experts=3, ranks_per_host=2)
    after = ExpertPlacement.of_ranks([[(2,), (0,), (1,), (0,)]], num_experts=3, ranks_per_host=2)
    assert [(move.expert, move.source, move.destination, move.slot) for move in moves_between(before, after)] == [
        (2, 3, 0, 0),
        (0, 0, 1, 1),
        (1, 1, 2, 2),
        (0, 2, 3, 3),
    ]
    # Two holders on the host: each sends one of the two layers.
    before = ExpertPlacement.of_ranks([[(0,), (0,), (1,), (1,)]] * 2, num_experts=2, ranks_per_host=4)
    after = ExpertPlacement.of_ranks([[(0,), (0,), (0,), (1,)]] * 2, num_experts=2, ranks_per_host=4)
    assert [move.source for move in moves_between(before, after)] == [0, 1]


def test_placements_of_different_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="num_ranks must be the same in both placements, got 2 and 4"):
        moves_between(round_robin(8, 2), round_robin(8, 4))
    same = round_robin(8, 2)
    with pytest.raises(ValueError, match="loads must be 1 layers of 8 experts"):
        rebalance(same, same, [[1.0] * 7])
    with pytest.raises(ValueError, match="tolerance must not be negative"):
        rebalance(same, same, [[1.0] * 8], tolerance=-1)
