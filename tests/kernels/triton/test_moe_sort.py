"""Entries in blocks of one expert each: kernels against the plain loop, in every detail that has a meaning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slipstream.kernels import moe_sort
from slipstream.kernels.moe_sort import (
    ExpertBlocks,
    count_by_expert,
    cut_into_blocks,
    most_blocks,
    sort_by_expert,
    sort_into_blocks,
    sort_into_blocks_reference,
)


def experts_of(seed: int, entries: int, num_experts: int) -> Tensor:
    """Return experts of which the first is chosen by half of the entries, and some by none."""
    draw = torch.Generator().manual_seed(seed)
    experts_R = torch.randint(0, max(1, num_experts - 2), (entries,), generator=draw)
    return torch.where(torch.rand(entries, generator=draw) < 0.5, 0, experts_R)


def assert_same(found: ExpertBlocks, expected: ExpertBlocks) -> None:
    assert torch.equal(found.rows_B, expected.rows_B)
    used = int((expected.rows_B > 0).sum())
    assert torch.equal(found.experts_B[:used], expected.experts_B[:used])
    for block, rows in enumerate(expected.rows_B.tolist()):
        assert torch.equal(found.entries_BM[block, :rows], expected.entries_BM[block, :rows])


@pytest.mark.parametrize("places", [4, 64])
@pytest.mark.parametrize(("entries", "num_experts"), [(0, 3), (1, 1), (1, 5), (37, 7), (300, 60), (70, 130), (50, 512)])
def test_kernel_is_the_reference(entries: int, num_experts: int, places: int, seed: int, launches: list[str]) -> None:
    experts_R = experts_of(seed, entries, num_experts)
    found = sort_into_blocks(experts_R, num_experts, places)
    assert_same(found, sort_into_blocks_reference(experts_R, num_experts, places))
    assert launches == (["_count_entries_kernel", "_place_entries_kernel"] if entries else [])


def test_several_tiles_of_a_chunk(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_sort, "_MOST_CHUNKS", 2)
    experts_R = experts_of(seed, 100, 200)
    assert_same(sort_into_blocks(experts_R, 200, 16), sort_into_blocks_reference(experts_R, 200, 16))


def test_all_entries_of_one_expert_and_of_none() -> None:
    for expert in (0, 4):
        experts_R = torch.full((33,), expert)
        assert_same(sort_into_blocks(experts_R, 5, 8), sort_into_blocks_reference(experts_R, 5, 8))
    found = sort_into_blocks(torch.full((33,), 5), 5, 8)
    assert found.rows_B.tolist() == [0] * most_blocks(33, 5, 8)


def test_entries_of_no_expert_are_left_out(seed: int) -> None:
    experts_R = experts_of(seed, 40, 6)
    experts_R[::3] = 6
    assert_same(sort_into_blocks(experts_R, 6, 8), sort_into_blocks_reference(experts_R, 6, 8))


@pytest.mark.parametrize("entries", [1, 5, 64, 200])
def test_blocks_never_exceed_the_room_that_all_have(entries: int) -> None:
    worst = 0
    for num_experts in (1, 3, 8):
        counts = [1] * min(entries, num_experts - 1)
        counts.append(entries - sum(counts))
        for shift in range(8):
            first = min(shift, counts[-1])
            shifted = [first, *counts[:-1], counts[-1] - first][: num_experts + 1]
            if len([count for count in shifted if count]) <= num_experts:
                blocks = sum(-(-count // 8) for count in shifted)
                worst = max(worst, blocks)
                assert blocks <= most_blocks(entries, num_experts, 8)
    assert worst


@pytest.mark.parametrize("places", [4, 64, 128])
@pytest.mark.parametrize(("rows", "num_experts"), [(0, 3), (1, 1), (37, 7), (90, 40)])
def test_rows_that_are_sorted_are_cut(rows: int, num_experts: int, places: int, seed: int, launches: list[str]) -> None:
    experts_R = experts_of(seed, rows, num_experts).sort().values
    found = cut_into_blocks(count_by_expert(experts_R, num_experts), rows, places)
    assert_same(found, sort_into_blocks_reference(experts_R, num_experts, places))
    assert launches == (["_cut_rows_kernel"] if rows else [])


def test_rows_behind_the_last_counted_one_are_in_no_block(seed: int) -> None:
    experts_R = experts_of(seed, 30, 5).sort().values
    found = cut_into_blocks(count_by_expert(experts_R, 5), 50, 8)
    assert found.rows_B.sum() == 30
    assert len(found.rows_B) == most_blocks(50, 5, 8)


def test_blocks_have_the_order_of_a_stable_sort(seed: int) -> None:
    experts_R = experts_of(seed, 90, 9)
    order_R, _ = sort_by_expert(experts_R, 9)
    found = sort_into_blocks(experts_R, 9, 8)
    entries = [found.entries_BM[block, :rows] for block, rows in enumerate(found.rows_B.tolist())]
    assert torch.equal(torch.cat(entries).to(torch.int64), order_R)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="512 at most"):
        sort_into_blocks(torch.zeros(3, dtype=torch.int64), 513, 8)
    with pytest.raises(ValueError, match="experts_R"):
        sort_into_blocks(torch.zeros(3, dtype=torch.int32), 5, 8)
    with pytest.raises(ValueError, match="counts_E"):
        cut_into_blocks(torch.zeros(3, dtype=torch.int64), 5, 129)
