"""Thousands of random lives of two replicas between which KV moves; and broken machines are found out by them.

A violation names its seed; ``python -P -m slipstream.tests.simulation.kv_lives SEED`` tells its story again.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from slipstream.comm.kv.coverage import Claim, Coverage
from slipstream.comm.kv.endings import Endings
from slipstream.comm.kv.incoming import Incoming, Outcome
from slipstream.comm.kv.outgoing import Outgoing
from slipstream.comm.kv.receiver import KvReceiver
from slipstream.comm.kv.sender import KvSender
from slipstream.comm.kv.transfer import Drained, Ending
from slipstream.tests.simulation.kv_lives import Tally, live, live_all
from slipstream.tests.simulation.kv_replicas import Wrong

DEFAULT = 2_000
ALL = 20_000
_MOST_FOR_A_MUTANT = 1_500


def test_every_transfer_ends_once_and_every_block_comes_back(seed: int) -> None:
    tally = live_all(seed, DEFAULT)
    print(tally)
    # The draws reach what they are meant to reach.
    assert tally.endings[Ending.COMMITTED] > DEFAULT / 2
    reached = {Ending(each) for each in tally.endings}
    wanted = {
        Ending.CANCELLED,
        Ending.NEVER_FITS,
        Ending.NO_ROOM,
        Ending.PARKED_FULL,
        Ending.NO_ANSWER,
        Ending.LEASE_EXPIRED,
        Ending.UNACKNOWLEDGED,
        Ending.DEADLINE,
        Ending.PEER_LOST,
        Ending.PEER_RESTARTED,
        Ending.BAD_CHECKSUM,
    }
    assert wanted <= reached, f"never came: {sorted(wanted - reached)}"
    assert len(tally.tries) == 3 and min(tally.faults.values()) > DEFAULT / 40
    assert {"duplicate", "late", "stale"} <= tally.dropped.keys()


@pytest.mark.slow
def test_twenty_thousand_lives(seed: int) -> None:
    print(live_all(seed, ALL))


def test_a_life_is_its_seed(seed: int) -> None:
    assert live(seed, Tally()).story == live(seed, Tally()).story


# ------------------------------------------------------------------ broken machines are found out


def _blocks_are_free_before_ranks_have_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    end = KvReceiver._end

    def at_once(self, one, ending, **how):
        end(self, one, ending, **how)
        for rank in self._ranks:
            self.report(Drained(transfer=one.transfer, generation=one.generation, rank=rank))

    monkeypatch.setattr(KvReceiver, "_end", at_once)


def _sent_blocks_are_free_while_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Outgoing, "close", _drained_at_once)


def _drained_at_once(self, transfer, generation):
    one = self._tracked.get(transfer)
    if one is not None and one.open is not None:
        one.open.closing = True
    self._reports.append(Drained(transfer=transfer, generation=generation, rank=self._rank))


def _writes_under_way_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    close = Incoming.close

    def at_once(self, transfer, generation):
        one = self._grants.get(transfer)
        if one is not None and one.writing:
            one.closing = True
            self._reports.append(Drained(transfer=transfer, generation=generation, rank=self._rank))
        else:
            close(self, transfer, generation)

    monkeypatch.setattr(Incoming, "close", at_once)


def _any_rank_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = KvReceiver._maybe_commit

    def with_one(self, one):
        if one.done:
            one.done |= self._ranks
        commit(self, one)

    monkeypatch.setattr(KvReceiver, "_maybe_commit", with_one)


def _sent_is_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = KvReceiver._maybe_commit

    def when_sent(self, one):
        if one.hand_off is not None:
            one.done |= self._ranks
        commit(self, one)

    monkeypatch.setattr(KvReceiver, "_maybe_commit", when_sent)


def _checksums_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = Incoming.finish
    monkeypatch.setattr(
        Incoming,
        "finish",
        lambda self, write, outcome: finish(
            self, write, Outcome.APPLIED if outcome is Outcome.BAD_CHECKSUM else outcome
        ),
    )


def _duplicates_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Coverage, "claim", lambda self, part, first, stop: Claim.NEW)
    monkeypatch.setattr(Coverage, "applied", lambda self, tokens: _less(self, tokens))


def _less(self, tokens):
    self._missing = max(self._missing - tokens, 0)


def _leases_last_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    tick = KvReceiver.tick

    def nobody_is_late(self, now_s):
        for one in self._receiving.values():
            one.heard_s, one.deadline_s = now_s, now_s + 1000.0
        tick(self, now_s)

    monkeypatch.setattr(KvReceiver, "tick", nobody_is_late)


def _references_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Endings, "why_not", lambda self, transfer, generation: None)


def _nothing_is_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does anything else end a sender that nobody answers."""
    monkeypatch.setattr(KvSender, "tick", lambda self, now_s: None)


def _the_next_generation_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    lose = KvSender._lose

    def at_once(self, now_s, one, ending, **how):
        one.undrained.clear()
        lose(self, now_s, one, ending, **how)

    monkeypatch.setattr(KvSender, "_lose", at_once)


@pytest.mark.parametrize(
    "mutate",
    [
        _blocks_are_free_before_ranks_have_closed,
        _sent_blocks_are_free_while_they_are_read,
        _writes_under_way_do_not_count,
        _any_rank_will_do,
        _sent_is_delivered,
        _checksums_do_not_count,
        _duplicates_count,
        _leases_last_for_ever,
        _references_are_used_again,
        _nothing_is_said_again,
        _the_next_generation_does_not_wait,
    ],
    ids=lambda mutate: mutate.__name__.strip("_"),
)
def test_a_broken_machine_is_found_out(
    mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError) as found:
        live_all(seed, _MOST_FOR_A_MUTANT)
    assert isinstance(found.value, Wrong) and "seed" in str(found.value)
    print(found.value)
