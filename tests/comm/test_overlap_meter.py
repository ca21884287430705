"""The meter, on a clock that only the test moves: what was on the wire, what of it was waited for, what was hidden."""

from __future__ import annotations

from functools import partial

import pytest
from torch import Tensor

from slipstream.comm.overlap import Begun, Steps, run_interleaved, run_plain
from slipstream.comm.overlap_meter import OverlapMeter
from slipstream.tests.fakes.scripted_work import HandClock, ScriptedWork


def _part(clock: HandClock, *, rounds: int, compute_s: float, wire_s: float) -> Steps[None]:
    for _ in range(rounds):
        clock.advance(compute_s)
        yield ScriptedWork(clock, wire_s)


def _always(seconds: float, result: Tensor) -> float:
    return seconds


def test_a_plain_run_hides_nothing() -> None:
    clock = HandClock()
    meter = OverlapMeter(clock, wire_s=lambda _: 1.0)
    run_plain(_part(clock, rounds=3, compute_s=2.0, wire_s=1.0), meter=meter)
    totals = meter.totals
    assert (totals.works, totals.compute_s, totals.wire_s, totals.exposed_s) == (3, 6.0, 3.0, 3.0)
    assert (totals.hidden_s, totals.hidden_fraction) == (0.0, 0.0)


def test_a_long_wire_is_hidden_as_far_as_the_other_part_computes() -> None:
    clock = HandClock()
    meter = OverlapMeter(clock, wire_s=lambda _: 3.0)
    run_interleaved([_part(clock, rounds=2, compute_s=1.0, wire_s=3.0) for _ in range(2)], meter=meter)
    # a0 1..4, b0 2..5, a1 5..8, b1 6..9: something is in flight from 1 to 9, and all but the two computes is waited.
    totals = meter.totals
    assert (clock(), totals.compute_s, totals.wire_s) == (9.0, 4.0, 8.0)
    assert totals.exposed_s == 5.0
    assert totals.hidden_s == 3.0


def test_a_work_that_ended_unseen_counts_by_its_estimate_and_never_more_than_the_time_there_was() -> None:
    # Each work ends while the other part computes: only the last is waited for, for its whole second.
    for estimate_s, hidden_s in ((0.5, 1.5), (1.0, 3.0), (3.0, 6.0)):
        clock = HandClock()
        meter = OverlapMeter(clock, wire_s=partial(_always, estimate_s))
        run_interleaved([_part(clock, rounds=2, compute_s=2.0, wire_s=1.0) for _ in range(2)], meter=meter)
        totals = meter.totals
        assert (totals.compute_s, totals.exposed_s) == (8.0, 1.0)
        assert totals.hidden_s == pytest.approx(hidden_s), f"estimate {estimate_s}"


def test_a_work_that_was_begun_counts_from_then_on() -> None:
    clock = HandClock()
    meter = OverlapMeter(clock, wire_s=lambda _: 3.0)

    def ladder() -> Steps[None]:
        first = ScriptedWork(clock, 3.0)
        yield Begun(first)
        clock.advance(2.0)
        second = ScriptedWork(clock, 3.0)
        yield Begun(second)
        yield first
        clock.advance(1.0)
        yield second

    run_plain(ladder(), meter=meter)
    # first 0..3, second 2..5: waited for from 2 to 3 and from 4 to 5.
    totals = meter.totals
    assert (clock(), totals.works, totals.compute_s) == (5.0, 2, 3.0)
    assert (totals.wire_s, totals.exposed_s, totals.hidden_s) == (5.0, 2.0, 3.0)


def test_a_plain_run_hides_not_even_the_time_between_two_readings_of_the_clock() -> None:
    now_s = iter(range(1000))
    meter = OverlapMeter(lambda: float(next(now_s)), wire_s=lambda _: 1.0)
    run_plain(_part(HandClock(), rounds=5, compute_s=0.0, wire_s=0.0), meter=meter)
    assert meter.totals.wire_s > 0.0
    assert meter.totals.hidden_s == 0.0


def test_nothing_measured_is_nothing_hidden() -> None:
    totals = OverlapMeter(HandClock(), wire_s=lambda _: 1.0).totals
    assert (totals.works, totals.hidden_s, totals.hidden_fraction) == (0, 0.0, 0.0)
