"""Ranks that die or stop: every survivor gets a named error in time, and the group is built again.

Links that are cut: ``tests/multinode/test_cut_links.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from slipstream.tests.comm.rank_acts import OPERATIONS, start_and_wait, start_when_told
from slipstream.tests.comm.ranks import (
    LOOPBACK,
    Answer,
    RankProcess,
    meet,
    name_of,
    open_together,
    result_of,
    together,
)
from slipstream.tests.contracts.collectives import anything_in_any_order

AT_ONCE_S = 10.0
"""What a loaded machine may take over what is seen at once; deadlines that must not be waited for are far longer."""

NEVER_S = 120.0

NUMBERS = 100_000

_generations = itertools.count()


class Crew:
    """Three rank processes, of which tests lose some."""

    def __init__(self) -> None:
        self.ranks = [RankProcess() for _ in range(3)]
        for rank in self.ranks:
            rank.hear("ready")
        meet(self.ranks)

    def open(self, ranks: list[RankProcess], *, timeout_s: float) -> None:
        open_together(ranks, generation=next(_generations), timeout_s=timeout_s)

    def start(self, ranks: list[RankProcess], operation: str) -> None:
        """Have ranks start an operation, and return when they have."""
        for rank in ranks:
            rank.tell("act", act=name_of(start_and_wait), operation=operation, numbers=NUMBERS)
        for rank in ranks:
            rank.hear("started")

    def works(self, ranks: list[RankProcess], seed: int) -> None:
        """Have ranks close what they have, open a group and use it."""
        together(ranks, "close", lambda _: {})
        self.open(ranks, timeout_s=30.0)
        arguments = {"name": "group", "scenario": name_of(anything_in_any_order), "seed": seed}
        for answer in together(ranks, "run", lambda _: arguments):
            result_of(answer)
        together(ranks, "close", lambda _: {})

    def end(self) -> None:
        for rank in self.ranks:
            rank.kill()


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    crew = Crew()
    try:
        yield crew
    finally:
        crew.end()


def named(answer: Answer, rank: int, size: int, *, within_s: float) -> str:
    """Return an error's name, and hold that it says where and came in time."""
    assert answer.error in ("PeerLost", "CommTimeout", "GroupClosed"), answer.traceback
    assert "group group: " in answer.message and f"at rank {rank} of {size}" in answer.message
    assert answer.took_s < within_s, f"{answer.message}, after {answer.took_s:.1f} s"
    return answer.error


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_killed_rank(crew: Crew, operation: str, seed: int) -> None:
    survivors, victim = crew.ranks[:2], crew.ranks[2]
    crew.open(crew.ranks, timeout_s=NEVER_S)
    crew.start(survivors, operation)
    victim.kill()
    crew.ranks[2] = replacement = RankProcess()
    answers = [rank.answer() for rank in survivors]
    assert [named(answer, place, 3, within_s=AT_ONCE_S) for place, answer in enumerate(answers)] == ["PeerLost"] * 2
    crew.works(survivors, seed)
    replacement.hear("ready")
    replacement.do("join", address=LOOPBACK, port=survivors[0].port)
    crew.works(crew.ranks, seed)


def test_a_rank_killed_when_it_had_done_its_part(crew: Crew, seed: int) -> None:
    """The one rank that had not called sees the loss, and ends the wait of the other, which lacks only its part."""
    crew.open(crew.ranks, timeout_s=NEVER_S)
    first, late, victim = crew.ranks
    crew.start([first, victim], "all_to_all")
    victim.kill()
    crew.ranks[2] = replacement = RankProcess()
    late.tell("act", act=name_of(start_when_told), operation="all_to_all", numbers=NUMBERS)
    named(late.answer(), 1, 3, within_s=AT_ONCE_S)
    named(first.answer(), 0, 3, within_s=AT_ONCE_S)
    replacement.hear("ready")
    replacement.do("join", address=LOOPBACK, port=first.port)
    crew.works(crew.ranks, seed)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_stopped_rank(crew: Crew, operation: str, seed: int) -> None:
    """It is late, not lost; when it goes on it finds its group dead, and takes part in the next."""
    survivors, victim = crew.ranks[:2], crew.ranks[2]
    deadline_s = 0.5
    crew.open(crew.ranks, timeout_s=deadline_s)
    crew.start(survivors, operation)
    victim.stop()
    try:
        answers = [rank.answer() for rank in survivors]
        kinds = [named(answer, place, 3, within_s=deadline_s + AT_ONCE_S) for place, answer in enumerate(answers)]
        assert "CommTimeout" in kinds
        crew.works(survivors, seed)
    finally:
        victim.resume()
    victim.tell("act", act=name_of(start_when_told), operation=operation, numbers=NUMBERS)
    assert named(victim.answer(), 2, 3, within_s=AT_ONCE_S) == "PeerLost"
    crew.works(crew.ranks, seed)


def test_the_first_to_give_up_ends_the_wait_of_all(crew: Crew, seed: int) -> None:
    first, patient, stopped = crew.ranks
    generation = next(_generations)
    arguments = {"name": "group", "generation": generation, "size": 3, "address": LOOPBACK, "open_timeout_s": 30.0}
    timeouts_s = (0.3, NEVER_S, NEVER_S)
    for answer in together(
        crew.ranks, "open", lambda place: {**arguments, "rank": place, "timeout_s": timeouts_s[place]}
    ):
        result_of(answer)
    crew.start([first, patient], "all_reduce")
    stopped.stop()
    try:
        assert named(first.answer(), 0, 3, within_s=AT_ONCE_S) == "CommTimeout"
        assert named(patient.answer(), 1, 3, within_s=AT_ONCE_S) == "PeerLost"
    finally:
        stopped.resume()
    crew.works(crew.ranks, seed)


def test_the_rank_that_hosted_the_rendezvous_is_killed(crew: Crew, seed: int) -> None:
    crew.open(crew.ranks, timeout_s=NEVER_S)
    victim, survivors = crew.ranks[0], crew.ranks[1:]
    crew.start(survivors, "all_reduce")
    victim.kill()
    replacement = RankProcess()
    for place, rank in enumerate(survivors, start=1):
        assert named(rank.answer(), place, 3, within_s=AT_ONCE_S) == "PeerLost"
    together(survivors, "leave", lambda _: {})
    replacement.hear("ready")
    crew.ranks = [*survivors, replacement]
    meet(crew.ranks)
    crew.works(crew.ranks, seed)
