"""Rows of all ranks on every rank, over any number of levels: in the order of ranks, each across a level once."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import Tensor

from slipstream.comm.collectives import Collectives
from slipstream.comm.level_gather import gather_counted_rows, gather_rows
from slipstream.comm.overlap import run_plain
from slipstream.tests.fakes.expert_ranks import LocalLevels

LEVELS = [(1,), (3,), (2, 2), (2, 3), (3, 2), (1, 3), (2, 1), (2, 2, 2)]
COUNTS = (2, 0, 3, 1, 0, 4, 1, 1)


def rows_of(rank: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.arange(count * 4).view(count, 4) % 7 + rank).to(dtype)


@pytest.mark.parametrize("sizes", LEVELS)
def test_as_many_rows_of_each_rank(sizes: tuple[int, ...]) -> None:
    groups = LocalLevels(sizes)

    def body(rank: int, levels: list[Collectives]) -> Tensor:
        return run_plain(gather_rows(levels, rows_of(rank, 2)))

    expected = torch.cat([rows_of(rank, 2) for rank in range(groups.ranks)])
    assert all(torch.equal(found, expected) for found in groups.run(body))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("sizes", LEVELS)
def test_rows_that_all_have_counted(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    groups, counts = LocalLevels(sizes), COUNTS[: prod(sizes)]

    def body(rank: int, levels: list[Collectives]) -> Tensor:
        return run_plain(gather_counted_rows(levels, rows_of(rank, counts[rank], dtype), counts))

    expected = torch.cat([rows_of(rank, count, dtype).float() for rank, count in enumerate(counts)])
    for found in groups.run(body):
        assert found.dtype == dtype
        assert torch.equal(found.float(), expected)


def test_a_row_crosses_to_each_host_once() -> None:
    groups, counts = LocalLevels((3, 2)), COUNTS[:6]
    groups.run(lambda rank, levels: run_plain(gather_counted_rows(levels, rows_of(rank, counts[rank]), counts)))
    # From a rank to the one with its place on each other host, and nowhere else.
    for source in range(6):
        for to in range(6):
            across = source != to and source % 2 == to % 2
            assert groups.sent(0)[source, to] == (counts[source] * 16 if across else 0)
