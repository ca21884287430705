"""What an exchange sends, counted from the routing: by hand, and near replicas and hosts save ways."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slipstream.benchmarks.expert_workloads import PlantedRouter
from slipstream.comm.expert_map import map_of
from slipstream.comm.expert_traffic import traffic
from slipstream.placement.expert_balance import balance_globally
from slipstream.placement.experts import ExpertPlacement
from slipstream.tests.placement.expert_cases import Problem, problems


def moved(placement: ExpertPlacement, choices: list[torch.Tensor]) -> tuple[int, int, int, int]:
    """Return the rows moved: flat, and those of them between hosts; over two levels, between hosts and inside."""
    placed, per_host = map_of(placement, 0), placement.ranks_per_host
    (flat,) = traffic(choices, placed, sizes=(placement.num_ranks,))
    across, inside = traffic(choices, placed, sizes=(placement.num_hosts, per_host))
    assert inside.rows_between_hosts(per_host) == 0
    return flat.moved_rows, flat.rows_between_hosts(per_host), across.moved_rows, inside.moved_rows


def chosen(*rows: tuple[int, ...], width: int) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), width)


def test_rows_by_hand() -> None:
    # Two hosts of two ranks: experts 0, 1 on rank 0, 2, 3 on rank 1, and so on.
    placement = ExpertPlacement.of_ranks([[(0, 1), (2, 3), (4, 5), (6, 7)]], num_experts=8, ranks_per_host=2)

    def from_rank(source: int, *experts: int) -> tuple[int, int, int, int]:
        width = len(experts)
        none = chosen(width=width)
        return moved(placement, [chosen(experts, width=width) if rank == source else none for rank in range(4)])

    assert from_rank(0, 0, 1) == (0, 0, 0, 0)
    assert from_rank(0, 2, 3) == (1, 0, 0, 1)
    # Four experts on the other host: two copies flat; one to the host, at rank 2, and one on from there.
    assert from_rank(0, 4, 5, 6, 7) == (2, 2, 1, 1)
    assert from_rank(1, 4, 5) == (1, 1, 1, 1)
    assert from_rank(1, 6, 7) == (1, 1, 1, 0)
    assert from_rank(3, 0, 2, 4, 6) == (3, 2, 1, 2)


def test_a_near_replica_saves_the_way() -> None:
    placement = ExpertPlacement.of_ranks([[(0, 1), (0, 2)]], num_experts=3, ranks_per_host=1)
    choices = [chosen((0,), (0,), width=1), chosen((0,), (1,), width=1)]
    assert moved(placement, choices) == (1, 1, 1, 0)


@given(problem=problems(), seed=st.integers(0, 2**32))
def test_two_levels_send_no_more_between_hosts(problem: Problem, seed: int) -> None:
    placement = balance_globally(
        problem.loads,
        num_slots=problem.num_slots,
        num_ranks=problem.num_ranks,
        ranks_per_host=problem.ranks_per_host,
    )
    router = PlantedRouter(
        experts=problem.num_experts, groups=1, top_k=min(4, problem.num_experts), inside=1.0, seed=seed
    )
    choices = [torch.tensor(rows) for rows in router.batch(problem.num_ranks, 5)]
    flat, flat_between, between, inside = moved(placement, choices)
    assert between <= flat_between <= flat <= between + inside
    assert between <= problem.num_ranks * 5 * (placement.num_hosts - 1), "once to each other host"
    if placement.num_hosts == 1:
        assert flat == inside


def test_sizes_that_do_not_fit_are_refused() -> None:
    placement = ExpertPlacement.of_ranks([[(0,), (1,)]], num_experts=2, ranks_per_host=2)
    with pytest.raises(ValueError, match="levels have 3 ranks, the map 2, and 2 choices are given"):
        traffic([chosen((0,), width=1)] * 2, map_of(placement, 0), sizes=(3,))
