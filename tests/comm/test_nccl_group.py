"""A group over NCCL as far as it shows without a GPU: on gloo's process group, and on one that obeys the test."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from slipstream.comm.errors import CommError, CommMisuse, CommTimeout, GroupClosed, PeerLost
from slipstream.comm.nccl_group import NcclGroup
from slipstream.runtime.clock import monotonic_clock
from slipstream.tests.comm.rank_acts import as_if_over_nccl
from slipstream.tests.comm.ranks import RankProcess, meet, name_of, result_of, together
from slipstream.tests.contracts import collectives

PATIENCE_S = 20.0


def test_its_calls_of_torch_keep_the_contract(seed: int) -> None:
    """Between two ranks, where every order of adding is that of the ranks."""
    ranks = [RankProcess(), RankProcess()]
    try:
        for rank in ranks:
            rank.hear("ready")
        meet(ranks)
        scenarios = [
            collectives.rows_do_not_matter_to_one_another,
            collectives.scatter_and_gather,
            collectives.move_everything,
            collectives.spread_rows_unevenly,
            collectives.many_in_flight,
            collectives.pairs_keep_their_order,
            collectives.misuse_is_named_and_harmless,
        ]
        arguments = {
            "act": name_of(as_if_over_nccl), "scenarios": [name_of(scenario) for scenario in scenarios],
            "seed": seed % 2**32, "size": 2, "generation": 0,
        }  # fmt: skip
        for answer in together(ranks, "act", lambda place: {**arguments, "place": place}):
            result_of(answer)
    finally:
        for rank in ranks:
            rank.kill()


class Native:
    """An operation on a device that ends when the test says so."""

    def __init__(self) -> None:
        self.ended = False
        self.error: str | None = None

    def is_completed(self) -> bool:
        return self.ended

    def exception(self) -> str | None:
        return self.error

    def wait(self) -> None:
        """As on a stream: returns at once."""


class Communicator:
    """What torch would give for NCCL."""

    def __init__(self) -> None:
        self.natives: list[Native] = []
        self.aborted = threading.Event()

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> Native:
        self.natives.append(Native())
        return self.natives[-1]

    def abort(self) -> None:
        assert not self.aborted.is_set()
        self.aborted.set()


def group_of(communicator: Communicator, *, timeout_s: float) -> NcclGroup:
    return NcclGroup(
        communicator, torch.device("cpu"), name="tp", rank=1, size=2, timeout_s=timeout_s, clock=monotonic_clock
    )


def assert_dead(group: NcclGroup, kind: type[CommError]) -> None:
    for call in (lambda: group.all_reduce(torch.ones(1)), group.barrier):
        with pytest.raises(kind, match=r"group tp: .* at rank 1 of 2"):
            call()


def test_a_wait_holds_up_no_host_and_the_guard_aborts_what_is_late() -> None:
    communicator = Communicator()
    group = group_of(communicator, timeout_s=0.1)
    x = torch.ones(4)
    first, second = group.all_reduce(x), group.all_reduce(x)
    assert first.wait() is x  # though the device has not come so far
    assert not first.done()
    communicator.natives[0].ended = True
    assert first.done()
    assert communicator.aborted.wait(PATIENCE_S)
    assert second.done()
    with pytest.raises(CommTimeout, match="group tp: all_reduce at rank 1 of 2: some rank did not take part in time"):
        second.wait()
    assert_dead(group, CommTimeout)


def test_a_failed_operation_ends_the_group() -> None:
    communicator = Communicator()
    group = group_of(communicator, timeout_s=1000.0)
    work = group.all_reduce(torch.ones(4))
    communicator.natives[0].error = "remote process exited"
    communicator.natives[0].ended = True
    assert communicator.aborted.wait(PATIENCE_S)
    with pytest.raises(PeerLost, match="NCCL: remote process exited"):
        work.wait()
    assert_dead(group, PeerLost)


def test_a_barrier_holds_up_the_host() -> None:
    communicator = Communicator()
    group = group_of(communicator, timeout_s=1000.0)
    with pytest.raises(CommTimeout, match=r"not complete within 0.05 s"):
        group.barrier(0.05)
    assert communicator.aborted.is_set()
    assert_dead(group, CommTimeout)


def test_close_aborts_once_and_types_that_are_not_added_are_refused() -> None:
    communicator = Communicator()
    group = group_of(communicator, timeout_s=1000.0)
    with pytest.raises(CommMisuse, match=r"cannot add torch\.int16"):
        group.all_reduce(torch.ones(1, dtype=torch.int16))
    work = group.all_reduce(torch.ones(1))
    group.close()
    group.close()
    assert communicator.aborted.is_set()
    with pytest.raises(GroupClosed, match="rank 1 closed the group"):
        work.wait()
    assert_dead(group, GroupClosed)
