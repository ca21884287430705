"""Maps of experts: every expert is found, replicas share the ranks, and what cannot be is named."""

from __future__ import annotations

import pytest
import torch

from slipstream.comm.expert_map import even_map, expert_map


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("num_experts", [1, 4, 10])
def test_without_replicas_each_rank_has_neighbours(num_experts: int, ranks: int) -> None:
    placed = even_map(num_experts, ranks=ranks)
    assert (placed.ranks, placed.num_experts) == (ranks, num_experts)
    assert placed.slots_NE.tolist() == [list(range(num_experts))] * ranks
    homes = placed.experts_NS.flatten().tolist()
    assert homes == [*range(num_experts), *[-1] * (ranks * placed.slots_per_rank - num_experts)]


def test_replicas_share_the_ranks_in_the_order_of_their_slots() -> None:
    # Expert 0 in slots 7, 0 and 3; expert 1 in slot 4; expert 2 in slots 6 and 1: four ranks of two slots.
    table = torch.tensor([[7, 0, 3], [-1, 4, -1], [6, -1, 1]])
    placed = expert_map(table, ranks=4, slots_per_rank=2)
    assert placed.experts_NS.tolist() == [[0, 2], [-1, 0], [1, -1], [2, 0]]
    assert placed.slots_NE.T.tolist() == [[0, 0, 3, 7], [4, 4, 4, 4], [1, 1, 6, 6]]
    for rank, slots in enumerate(placed.slots_NE.tolist()):
        found = [placed.experts_NS.flatten()[slot].item() for slot in slots]
        assert found == [0, 1, 2], f"rank {rank} finds every expert where it is"


def test_digests_tell_maps_apart_and_not_how_they_are_written() -> None:
    table = torch.tensor([[3, 0], [1, -1]])
    digest = expert_map(table, ranks=2, slots_per_rank=2).digest
    assert expert_map(torch.tensor([[0, 3], [-1, 1]]), ranks=2, slots_per_rank=2).digest == digest
    assert expert_map(torch.tensor([[0, 3], [-1, 2]]), ranks=2, slots_per_rank=2).digest != digest
    assert expert_map(table, ranks=1, slots_per_rank=4).digest != digest, "the same slots, cut otherwise"


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ([[0], [-1]], "expert 1 has no slot"),
        ([[0], [4]], "slot 4 does not exist: 2 ranks have 2 slots each"),
        ([[0, 1], [1, -1]], "slot 1 is given to two experts"),
        ([[0, 0], [1, -1]], "slot 0 is given to two experts"),
        ([0, 1], r"slots must be int64 \[experts, replicas\], got torch.int64 \[2\]"),
        ([[0.0]], "got torch.float32"),
    ],
)
def test_tables_that_cannot_be_are_named(table: list[list[float]], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        expert_map(torch.tensor(table), ranks=2, slots_per_rank=2)
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 2"):
        expert_map(torch.tensor([[0]]), ranks=0, slots_per_rank=2)
