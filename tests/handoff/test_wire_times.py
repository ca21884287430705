"""How long KV was on its way, and what of that nobody waited for."""

from __future__ import annotations

import pytest

from slipstream.comm.kv.transfer import TransferId
from slipstream.runtime.handoff.wire_times import WireTimes

TRANSFER = TransferId("prefill-0", 1, 7)


def opened() -> WireTimes:
    times = WireTimes()
    times.open(TRANSFER, 1, tokens=100)
    return times


def test_what_is_on_its_way_before_the_last_step_ends_is_hidden() -> None:
    times = opened()
    times.posted(1.0, TRANSFER)
    times.posted(1.5, TRANSFER)
    times.released(2.0, TRANSFER, 10)
    times.released(3.0, TRANSFER, 10)
    times.computed(3.5, TRANSFER, 60)
    times.posted(4.0, TRANSFER)
    times.computed(5.0, TRANSFER, 100)
    times.released(8.0, TRANSFER, 10)
    found = times.take(TRANSFER, 1)
    assert found is not None
    assert (found.sent_bytes, found.wire_s, found.hidden_s) == (30, 6.0, 3.0)


def test_all_of_it_is_hidden_where_it_was_over_before_the_last_step() -> None:
    times = opened()
    times.posted(1.0, TRANSFER)
    times.computed(1.5, TRANSFER, 60)
    times.released(2.0, TRANSFER, 10)
    found = times.take(TRANSFER, 1)
    assert found is not None and found.wire_s == found.hidden_s == 1.0


def test_nothing_is_hidden_of_what_begins_when_all_is_computed() -> None:
    times = opened()
    times.computed(1.0, TRANSFER, 100)
    times.posted(2.0, TRANSFER)
    times.released(4.0, TRANSFER, 10)
    found = times.take(TRANSFER, 1)
    assert found is not None and (found.wire_s, found.hidden_s) == (2.0, 0.0)


@pytest.mark.parametrize("generation", [2, 0])
def test_another_generation_takes_nothing(generation: int) -> None:
    times = opened()
    assert times.take(TRANSFER, generation) is None
    assert times.take(TRANSFER, 1) is not None and times.take(TRANSFER, 1) is None
