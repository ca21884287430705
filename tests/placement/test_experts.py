"""Placements as values, and which replica a token takes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.placement.expert_balance import balance_globally
from slipstream.placement.expert_routes import routes_from, slots_by_source, source_cycles
from slipstream.placement.experts import ExpertPlacement, round_robin
from slipstream.tests.placement.expert_cases import Problem, problems

# Two hosts of two ranks, two slots each: expert 0 is everywhere, 1 on both hosts, the others once.
PLACEMENT = ExpertPlacement(
    num_experts=4, num_ranks=4, ranks_per_host=2, physical_to_logical=((0, 1, 0, 2, 0, 1, 0, 3),)
)


def test_the_two_maps_are_inverses() -> None:
    assert PLACEMENT.logical_to_physical == (((0, 2, 4, 6), (1, 5), (3,), (7,)),)
    assert PLACEMENT.replicas(0, 1) == (1, 5)
    assert [PLACEMENT.rank_of(slot) for slot in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [PLACEMENT.host_of(rank) for rank in range(4)] == [0, 0, 1, 1]
    assert PLACEMENT.experts_by_rank(0) == [(0, 1), (0, 2), (0, 1), (0, 3)]
    shape = (PLACEMENT.num_layers, PLACEMENT.num_slots, PLACEMENT.slots_per_rank, PLACEMENT.num_hosts)
    assert shape == (1, 8, 2, 2)


def test_equal_placements_are_equal_and_hash_alike() -> None:
    again = ExpertPlacement.of_ranks([[(0, 1), (0, 2), (0, 1), (0, 3)]], num_experts=4, ranks_per_host=2)
    assert again == PLACEMENT
    assert hash(again) == hash(PLACEMENT)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"num_ranks": 0}, "num_ranks must be at least 1, got 0"),
        ({"ranks_per_host": 3}, "ranks_per_host must divide the 4 ranks, got 3"),
        ({"physical_to_logical": ()}, "physical_to_logical must have at least one layer"),
        ({"physical_to_logical": ((0, 1, 2, 3, 0),)}, "num_slots must be a multiple of the 4 ranks, got 5"),
        ({"num_experts": 9}, "num_slots must be at least the 9 experts, got 4"),
        (
            {"num_experts": 1, "physical_to_logical": ((0,) * 8,)},
            "num_slots must be at most 1 experts times 4 ranks, got 8",
        ),
        ({"physical_to_logical": ((0, 1, 2, 3), (0, 1, 2))}, r"physical_to_logical\[1\] must have 4 slots .* got 3"),
        ({"physical_to_logical": ((0, 1, 2, 4),)}, r"physical_to_logical\[0\]\[3\] must be one of 4 experts, got 4"),
        ({"physical_to_logical": ((0, 1, 2, -1),)}, r"physical_to_logical\[0\]\[3\] must be one of 4 experts, got -1"),
        ({"physical_to_logical": ((0, 1, 2, 2),)}, r"physical_to_logical\[0\]: expert 3 has no slot"),
        (
            {"physical_to_logical": ((0, 1, 2, 2, 3, 0, 1, 0),)},
            r"physical_to_logical\[0\]: expert 2 is twice on one rank, slots \[2, 3\]",
        ),
    ],
)
def test_a_placement_that_cannot_be_names_the_field(wrong: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {
        "num_experts": 4,
        "num_ranks": 4,
        "ranks_per_host": 2,
        "physical_to_logical": ((0, 1, 2, 3),),
    }
    with pytest.raises(ValueError, match=message):
        ExpertPlacement(**(fields | wrong))


def test_ranks_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layers\[1\]: all layers need as many ranks"):
        ExpertPlacement.of_ranks([[(0,), (1,)], [(0, 1)]], num_experts=2, ranks_per_host=1)
    with pytest.raises(ValueError, match=r"layers\[0\]: .* all ranks as many slots"):
        ExpertPlacement.of_ranks([[(0, 1), (1,)]], num_experts=2, ranks_per_host=1)
    with pytest.raises(ValueError, match="layers must not be empty"):
        ExpertPlacement.of_ranks([], num_experts=2, ranks_per_host=1)


def test_slots_and_ranks_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="slot 8 is not among 8"):
        PLACEMENT.rank_of(8)
    with pytest.raises(ValueError, match="rank 4 is not among 4"):
        PLACEMENT.host_of(4)
    with pytest.raises(ValueError, match="rank -1 is not among 4"):
        routes_from(PLACEMENT, -1)


@pytest.mark.parametrize(
    ("experts", "ranks", "held"),
    [
        (4, 2, [(0, 2), (1, 3)]),
        (5, 2, [(0, 2, 4), (1, 3, 0)]),
        (2, 4, [(0,), (1,), (0,), (1,)]),
        (3, 1, [(0, 1, 2)]),
    ],
)
def test_round_robin_deals_in_turn(experts: int, ranks: int, held: list[tuple[int, ...]]) -> None:
    placement = round_robin(experts, ranks, num_layers=3)
    assert [placement.experts_by_rank(layer) for layer in range(3)] == [held] * 3


@pytest.mark.parametrize("experts", range(1, 20))
def test_round_robin_is_a_placement_for_any_sizes(experts: int) -> None:
    for ranks in range(1, 12):
        fewest = -(-experts // ranks)
        assert round_robin(experts, ranks).slots_per_rank == fewest
        # That no expert is twice on a rank, the value itself refuses.
        for per_rank in range(fewest, experts + 1):
            placement = round_robin(experts, ranks, num_slots=per_rank * ranks)
            counts = {len(slots) for slots in placement.logical_to_physical[0]}
            assert max(counts) - min(counts) <= 1
    with pytest.raises(ValueError, match="num_ranks"):
        round_robin(experts, 0)
    with pytest.raises(ValueError, match="num_slots must be at most"):
        round_robin(experts, 2, num_slots=2 * experts + 2)


def test_a_token_takes_the_nearest_replica() -> None:
    assert routes_from(PLACEMENT, 2).cycles == (((4, 4, 4, 4), (5, 5), (3,), (7,)),)
    # Ranks 1 and 3 hold no replica of expert 1, but their hosts do.
    assert source_cycles(PLACEMENT, 0, 1) == ((1, 1), (1, 1), (5, 5), (5, 5))
    routes = routes_from(PLACEMENT, 3)
    assert routes.source == 3
    assert [routes.slot(0, expert, 17) for expert in range(4)] == [6, 5, 3, 7]


def test_replicas_are_used_evenly_where_near_alone_would_not_be() -> None:
    # Two replicas on the first host and one on the second: its ranks must send some of their tokens over.
    held = ((0, 1, 0, 2, 0, 3, 1, 2),)
    placement = ExpertPlacement(num_experts=4, num_ranks=4, ranks_per_host=2, physical_to_logical=held)
    cycles = source_cycles(placement, 0, 0)
    assert cycles[:3] == ((0, 0, 0), (2, 2, 2), (4, 4, 4)), "those that hold one"
    assert Counter(cycles[3]) == {0: 1, 2: 1, 4: 1}
    routes = routes_from(placement, 3)
    assert sorted(routes.slot(0, 0, row) for row in range(5, 8)) == [0, 2, 4], "taken in turn"
    # With one part a source has one slot, and the last rank's is the one with room on its host.
    assert slots_by_source(placement, 0) == ((0, 1, 3, 5), (2, 1, 3, 5), (4, 6, 7, 5), (4, 6, 7, 5))
    with pytest.raises(ValueError, match="parts must be at least 1, got 0"):
        source_cycles(placement, 0, 0, parts=0)


@given(problem=problems(), parts=st.one_of(st.none(), st.integers(1, 5)))
def test_every_replica_gets_the_same_share_of_all_sources(problem: Problem, parts: int | None) -> None:
    placement = balance_globally(
        problem.loads,
        num_slots=problem.num_slots,
        num_ranks=problem.num_ranks,
        ranks_per_host=problem.ranks_per_host,
    )
    for expert in range(problem.num_experts):
        slots = placement.replicas(0, expert)
        cycles = source_cycles(placement, 0, expert, parts=parts)
        length = parts or len(slots)
        assert {len(cycle) for cycle in cycles} == {length}
        used = Counter(slot for cycle in cycles for slot in cycle)
        assert set(used) <= set(slots)
        if parts is None:
            assert used == dict.fromkeys(slots, problem.num_ranks)
        assert max(used.values()) <= -(-problem.num_ranks * length // len(slots))
        for source, cycle in enumerate(cycles):
            own = [slot for slot in slots if placement.rank_of(slot) == source]
            assert not own or set(cycle) == set(own), "a rank's own replica comes first"
    for source, chosen in enumerate(slots_by_source(placement, 0)):
        assert chosen == tuple(cycle[0] for cycle in routes_from(placement, source, parts=1).cycles[0])
