"""Placements as values, and which replica a token takes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given

from slipstream.placement.expert_balance import balance_globally
from slipstream.placement.expert_routes import slots_by_source
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
        PLACEMENT.host_of(-1)


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


def test_tokens_take_the_nearest_replica() -> None:
    # Expert 0 is on every rank; ranks 1 and 3 hold no replica of expert 1, but their hosts do.
    assert slots_by_source(PLACEMENT, 0) == ((0, 1, 3, 7), (2, 1, 3, 7), (4, 5, 3, 7), (6, 5, 3, 7))


def test_replicas_are_used_evenly_where_near_alone_would_not_be() -> None:
    # Two replicas of expert 0 on the first host and one on the second, where the last rank finds room.
    held = ((0, 1, 0, 2, 0, 3, 1, 2),)
    placement = ExpertPlacement(num_experts=4, num_ranks=4, ranks_per_host=2, physical_to_logical=held)
    assert slots_by_source(placement, 0) == ((0, 1, 3, 5), (2, 1, 3, 5), (4, 6, 7, 5), (4, 6, 7, 5))
    # All replicas on the first host: the second host's ranks take one each.
    placement = ExpertPlacement.of_ranks([[(0, 1), (0, 2), (1, 2), (1, 2)]], num_experts=3, ranks_per_host=2)
    assert [slots[0] for slots in slots_by_source(placement, 0)] == [0, 2, 0, 2]


@given(problem=problems())
def test_every_replica_serves_about_as_many_sources_and_its_own_rank_first(problem: Problem) -> None:
    placement = balance_globally(
        problem.loads,
        num_slots=problem.num_slots,
        num_ranks=problem.num_ranks,
        ranks_per_host=problem.ranks_per_host,
    )
    chosen = slots_by_source(placement, 0)
    assert len(chosen) == problem.num_ranks
    for expert in range(problem.num_experts):
        slots = placement.replicas(0, expert)
        used = Counter(source[expert] for source in chosen)
        assert set(used) <= set(slots)
        most = -(-problem.num_ranks // len(slots))
        assert max(used.values()) <= most
        for source, mine in enumerate(chosen):
            own = [slot for slot in slots if placement.rank_of(slot) == source]
            assert not own or mine[expert] == own[0], "a rank's own replica comes first"
            near = [slot for slot in slots if placement.host_of(placement.rank_of(slot)) == placement.host_of(source)]
            # Only where those of its host are fully used does a rank take a far one.
            assert mine[expert] in near or all(used[slot] == most for slot in near)
