"""Thousands of random lives of two replicas between which KV moves; and broken machines are found out by them.

A violation names its seed; ``python -P -m slipstream.tests.simulation.kv_lives SEED`` tells its story again.
"""

from __future__ import annotations

import pytest

from slipstream.comm.kv.transfer import Ending
from slipstream.tests.simulation.kv_lives import Tally, live, live_all

DEFAULT = 2_000
ALL = 20_000
_MOST_FOR_A_MUTANT = 1_500


def test_every_transfer_ends_once_and_every_block_comes_back(seed: int) -> None:
    tally = live_all(seed, DEFAULT)
    print(tally)
    # The draws reach what they are meant to reach.
    assert tally.endings[Ending.COMMITTED] > DEFAULT / 2
    reached = {Ending(each) for each, count in tally.endings.items() if count >= 5}
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
