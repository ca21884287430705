"""Many random lives of a cluster that splits requests; and broken parts are found out by them.

A violation names its seed; ``python -P -m slipstream.tests.simulation.split_lives SEED`` tells its story again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest

from slipstream.comm.kv.receiver import KvReceiver
from slipstream.comm.kv.transfer import Drained, Ending
from slipstream.runtime.engine.kv_lending import KvLending
from slipstream.runtime.engine.scheduler import Scheduler
from slipstream.runtime.gateway.request import Deliver, RequestWay
from slipstream.runtime.gateway.router import Router
from slipstream.runtime.handoff.desk import HandOffDesk
from slipstream.runtime.worker.driver_hand_off import HandOffs
from slipstream.tests.simulation.kv_replicas import Wrong
from slipstream.tests.simulation.split_lives import Tally, live, live_all, live_all_on_two_cores

LIVES = 5_000
_MOST_FOR_A_MUTANT = 200


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What desks log of thousands of broken connections is of no interest."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def test_every_request_ends_once_and_every_block_comes_back(seed: int) -> None:
    tally = live_all_on_two_cores(seed, LIVES)
    print(tally)
    # The draws reach what they are meant to reach.
    assert tally.outcomes["finished"] > LIVES and {"left", "DeadlineExceeded"} <= tally.outcomes.keys()
    assert tally.endings[Ending.COMMITTED] > LIVES / 2 and tally.endings[Ending.NO_ANSWER] and len(tally.endings) > 2
    assert len(tally.faults) == 5 and min(tally.faults.values()) > LIVES / 40 and tally.moved > LIVES / 10


def test_a_life_is_its_seed(seed: int) -> None:
    assert live(seed, Tally()).story == live(seed, Tally()).story


# ------------------------------------------------------------------ broken parts are found out


def _what_was_told_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    take = RequestWay.take

    def all_of_it(self, attempt, index, token_ids, *, now_s):
        actions = take(self, attempt, index, token_ids, now_s=now_s)
        return [Deliver(skip=0) if isinstance(action, Deliver) else action for action in actions]

    monkeypatch.setattr(RequestWay, "take", all_of_it)


def _a_replay_begins_from_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequestWay, "_generated", lambda self: ())


def _nothing_is_ever_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequestWay, "due", lambda self, now_s: [])


def _routes_are_counted_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Router, "ended", lambda self, route: None)


def _the_desk_keeps_what_was_adopted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HandOffDesk, "adopted", lambda self, arrived: None)


def _sent_blocks_are_never_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "release_sent", lambda self, number: None)


def _sent_blocks_are_free_when_their_prompt_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    is_handed = HandOffs.is_handed

    def and_freed(self, live, sequence):
        handed = is_handed(self, live, sequence)
        if sequence.transfer is not None:
            self._engine.scheduler.release_sent(sequence.transfer)
        return handed

    monkeypatch.setattr(HandOffs, "is_handed", and_freed)


def _who_leaves_still_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HandOffs, "leave", lambda self, live: None)


def _sent_is_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = KvReceiver._maybe_commit

    def when_sent(self, one):
        if one.hand_off is not None:
            one.done |= self._ranks
        commit(self, one)

    monkeypatch.setattr(KvReceiver, "_maybe_commit", when_sent)


def _blocks_are_free_before_ranks_have_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    end = KvReceiver._end

    def at_once(self, one, ending, **how):
        end(self, one, ending, **how)
        for rank in self._ranks:
            self.report(Drained(transfer=one.transfer, generation=one.generation, rank=rank))

    monkeypatch.setattr(KvReceiver, "_end", at_once)


def _more_is_said_to_be_cached_than_is(monkeypatch: pytest.MonkeyPatch) -> None:
    lend = KvLending.lend

    def one_block_more(self, request, key, **how):
        lent = lend(self, request, key, **how)
        return lent if lent is None else (lent[0], min(lent[1] + self._block_size, len(request.prompt_token_ids)))

    monkeypatch.setattr(KvLending, "lend", one_block_more)


@pytest.mark.parametrize(
    "mutate",
    [
        _what_was_told_is_told_again,
        _a_replay_begins_from_nothing,
        _nothing_is_ever_due,
        _routes_are_counted_for_ever,
        _the_desk_keeps_what_was_adopted,
        _sent_blocks_are_never_given_back,
        _sent_blocks_are_free_when_their_prompt_is_computed,
        _who_leaves_still_waits,
        _sent_is_delivered,
        _blocks_are_free_before_ranks_have_closed,
        _more_is_said_to_be_cached_than_is,
    ],
    ids=lambda mutate: mutate.__name__.strip("_"),
)
def test_a_broken_part_is_found_out(
    mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    mutate(monkeypatch)
    with pytest.raises(Wrong, match="seed") as found:
        live_all(seed, _MOST_FOR_A_MUTANT)
    print(found.value)
