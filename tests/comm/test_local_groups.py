"""Groups of threads keep the contract, and see ranks that do not agree."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from slipstream.comm.collectives import Collectives
from slipstream.comm.errors import CommMisuse, CommTimeout, GroupClosed, PeerLost
from slipstream.comm.local_groups import LocalRank, local_group, run_ranks
from slipstream.tests.contracts.collectives import CollectivesContract, Scenario


class TestLocalGroups(CollectivesContract):
    def run(self, size: int, scenario: Scenario, seed: int, *, timeout_s: float = 30.0) -> list[object]:
        return run_ranks(local_group(size, timeout_s=timeout_s), lambda rank: scenario(rank, seed))


def _reduce(rank: Collectives) -> None:
    rank.all_reduce(torch.ones(4)).wait()


@pytest.mark.parametrize(
    ("mine", "named"),
    [
        (lambda rank: rank.all_gather(torch.ones(4)).wait(), "all_gather"),
        (lambda rank: rank.all_reduce(torch.ones(5)).wait(), r"\(5,\)"),
        (lambda rank: rank.all_reduce(torch.ones(4), op="max").wait(), "'max'"),
        (lambda rank: rank.all_reduce(torch.ones(4).half()).wait(), "float16"),
        (lambda rank: rank.barrier(), "barrier"),
    ],
)
def test_ranks_that_call_different_operations(mine: Callable[[Collectives], None], named: str) -> None:
    def body(rank: Collectives) -> str:
        with pytest.raises(CommMisuse, match="ranks do not agree") as seen:
            (mine if rank.rank == 1 else _reduce)(rank)
        with pytest.raises(CommMisuse):
            rank.barrier()
        return str(seen.value)

    for message in run_ranks(local_group(3), body):
        assert "all_reduce" in message
        assert re.search(named, message)


def test_counts_that_do_not_fit() -> None:
    def body(rank: Collectives) -> None:
        # Rank 0 sends two rows to rank 1, which expects one.
        send, receive = ([0, 2], [0, 0]) if rank.rank == 0 else ([0, 0], [1, 0])
        with pytest.raises(CommMisuse, match="rank 0 sends 2 rows, rank 1 expects 1"):
            rank.all_to_all(torch.ones(sum(send)), send_counts=send, receive_counts=receive).wait()

    run_ranks(local_group(2), body)


def test_what_is_received_is_what_is_sent() -> None:
    def body(rank: Collectives) -> None:
        with pytest.raises(CommMisuse, match=r"rank 0 sends torch.float32 \[3\], rank 1 receives torch.float32 \[4\]"):
            (rank.send(torch.ones(3), to=1) if rank.rank == 0 else rank.receive(torch.ones(4), source=0)).wait()

    run_ranks(local_group(2), body)


def test_a_rank_that_raises_ends_the_others() -> None:
    def body(rank: Collectives) -> None:
        if rank.rank == 1:
            raise KeyError("a bug of rank 1")
        rank.barrier()

    with pytest.raises(KeyError, match="a bug of rank 1"):
        run_ranks(local_group(3), body)


def test_a_lost_rank() -> None:
    def body(rank: Collectives) -> None:
        rank.barrier()
        if rank.rank == 0:
            assert isinstance(rank, LocalRank)
            rank.lose()
            return
        with pytest.raises(PeerLost, match="group tp: all_reduce at rank 1 of 2: rank 0 ended"):
            rank.all_reduce(torch.ones(1)).wait()

    run_ranks(local_group(2, name="tp"), body)


def test_the_deadline_is_the_groups_and_names_who_is_missing() -> None:
    ranks = local_group(3, timeout_s=0.05)
    ranks[2].all_reduce(torch.ones(1))
    with pytest.raises(CommTimeout, match=r"rank 1 did not take part within 0.05 s"):
        ranks[0].all_reduce(torch.ones(1)).wait()
    with pytest.raises(CommTimeout):
        ranks[1].barrier()


def test_a_body_that_does_not_end_is_named() -> None:
    ranks = local_group(2)

    def body(rank: Collectives) -> None:
        if rank.rank == 1:
            rank.receive(torch.ones(1), source=0).wait()

    with pytest.raises(CommTimeout, match="rank-1 has not ended"):
        run_ranks(ranks, body, timeout_s=0.1)
    ranks[0].close()


def test_close_is_seen_by_all() -> None:
    ranks = local_group(2, name="ep")
    work = ranks[0].all_reduce(torch.ones(1))
    ranks[1].close()
    with pytest.raises(GroupClosed, match="group ep: all_reduce at rank 0 of 2: rank 1 closed the group"):
        work.wait()


def test_bytes_are_counted_by_pair() -> None:
    sent: Counter[tuple[int, int]] = Counter()

    def body(rank: Collectives) -> None:
        send, receive = ([1, 3], [1, 0]) if rank.rank == 0 else ([0, 2], [3, 2])
        rank.all_to_all(torch.ones(sum(send), 5), send_counts=send, receive_counts=receive).wait()

    run_ranks(local_group(2, bytes_sent=sent), body)
    assert sent == {(0, 1): 3 * 5 * 4, (1, 0): 0}

    sent.clear()
    run_ranks(local_group(4, bytes_sent=sent), lambda rank: rank.all_gather(torch.ones(3)).wait())
    assert sent == {(source, to): 12 for source in range(4) for to in range(4) if source != to}

    sent.clear()
    run_ranks(local_group(4, bytes_sent=sent), lambda rank: rank.all_reduce(torch.ones(8)).wait())
    assert set(sent.values()) == {2 * 8 * 4 // 4}
