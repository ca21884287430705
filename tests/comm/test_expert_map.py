"""Maps of experts: every expert is found, replicas share the ranks, and what cannot be is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slipstream.comm.expert_map import even_map, expert_map, map_of
from slipstream.placement.experts import ExpertPlacement


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("num_experts", [1, 4, 10])
def test_without_replicas_each_rank_has_neighbours(num_experts: int, ranks: int) -> None:
    placed = even_map(num_experts, ranks=ranks)
    assert (placed.ranks, placed.num_experts) == (ranks, num_experts)
    assert placed.slots_NE.tolist() == [list(range(num_experts))] * ranks
    homes = placed.experts_NS.flatten().tolist()
    assert homes == [*range(num_experts), *[-1] * (ranks * placed.slots_per_rank - num_experts)]


def test_a_rank_with_its_own_replica_uses_it_and_otherwise_one_of_its_host() -> None:
    # Two hosts of two ranks. Expert 0 is on ranks 1 and 3, expert 1 on ranks 0 and 2, the others once.
    placement = ExpertPlacement.of_ranks([[(1, 2), (0, 3), (1, 4), (0, 5)]], num_experts=6, ranks_per_host=2)
    placed = map_of(placement, 0)
    assert placed.experts_NS.tolist() == [[1, 2], [0, 3], [1, 4], [0, 5]]
    assert placed.slots_NE[:, 0].tolist() == [2, 2, 6, 6]
    assert placed.slots_NE[:, 1].tolist() == [0, 0, 4, 4]
    for rank, slots in enumerate(placed.slots_NE.tolist()):
        found = [placed.experts_NS.flatten()[slot].item() for slot in slots]
        assert found == list(range(6)), f"rank {rank} finds every expert where it is"


def test_digests_tell_maps_apart() -> None:
    held, slots = torch.tensor([[0, 1], [-1, 0]]), torch.tensor([[0, 1], [0, 1]])
    digest = expert_map(held, slots).digest
    assert expert_map(held.clone(), slots.clone()).digest == digest
    assert expert_map(torch.tensor([[0, 1], [0, -1]]), slots).digest != digest, "another slot has a replica"
    assert expert_map(held, torch.tensor([[0, 1], [3, 1]])).digest != digest, "another replica is used"
    assert expert_map(held.view(1, 4), slots[:1]).digest != digest, "the same slots, cut otherwise"


@pytest.mark.parametrize(
    ("held", "slots", "reason"),
    [
        ([[0, -1], [-1, -1]], [[0, 1], [0, 1]], "rank 0 looks for expert 1 in slot 1, which has another"),
        ([[0, 1], [1, -1]], [[0, 1], [0, 0]], "rank 1 looks for expert 1 in slot 0, which has another"),
        ([[0, 1], [1, -1]], [[0, 1], [0, 4]], "slot 4 does not exist: there are 4"),
        ([[0, 1], [1, -1]], [[0, -1], [0, 1]], "slot -1 does not exist: there are 4"),
        ([[0, 1]], [[0, 1], [0, 1]], "experts are of 1 ranks, slots of 2"),
        ([0, 1], [[0, 1]], r"experts must be int64 \[ranks, ...\], not empty, got torch.int64 \[2\]"),
        ([[0, 1]], [[0.0, 1.0]], r"slots must be int64 .* got torch.float32 \[1, 2\]"),
        ([[]], [[0]], "experts must be int64"),
    ],
)
def test_tables_that_cannot_be_are_named(held: list[Any], slots: list[Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        expert_map(torch.tensor(held), torch.tensor(slots))
