"""Measures how much wire time was hidden behind compute: what ``overlap`` reports for metrics and benchmarks.

Knows works and a clock, not who runs them. It is for works whose ``wait`` blocks the thread (CPU); on a GPU waiting is
put on a stream, and only the device's own events can tell.

A work that was waited for ended when the wait did. When one ended that was complete before it was waited for, nobody
saw: there an estimate from the measured link counts, and never more than the time that had passed. A work counts from
when it was yielded, as one to wait for or as one that was begun.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .collectives import Work

_AT_ONCE = 0.25
"""Waits below this share of the expected time are those of a work that is complete: it adds up what came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapTotals:
    """Where the time of all measured steps went.

    ``wire_s`` is the time in which at least one work was in flight, ``exposed_s`` the time spent waiting for one.
    """

    works: int
    compute_s: float
    wire_s: float
    exposed_s: float

    @property
    def hidden_s(self) -> float:
        """The wire time during which this rank computed."""
        return max(0.0, self.wire_s - self.exposed_s)

    @property
    def hidden_fraction(self) -> float:
        """The share of the wire time that was hidden; 0 if there was none."""
        return self.hidden_s / self.wire_s if self.wire_s else 0.0


@dataclass(slots=True, eq=False)
class _Flight:
    """A work in flight."""

    work: Work
    began_s: float
    wait_began_s: float = 0.0


class OverlapMeter:
    """Adds up compute, wire and waiting times. One thread uses it.

    ``wire_s`` estimates the seconds that a work takes, from its result.
    """

    def __init__(self, clock: Callable[[], float], *, wire_s: Callable[[Tensor], float]) -> None:
        self._clock = clock
        self._estimate_s = wire_s
        self._flights: list[_Flight] = []
        self._awaited: _Flight | None = None
        self._began_s = self._ended_s = 0.0
        self._wire_until_s = float("-inf")
        self._works = 0
        self._compute_s = self._wire_s = self._exposed_s = 0.0

    @property
    def totals(self) -> OverlapTotals:
        """What was measured so far."""
        return OverlapTotals(
            works=self._works, compute_s=self._compute_s, wire_s=self._wire_s, exposed_s=self._exposed_s
        )

    def compute_begins(self) -> None:
        """A piece is resumed."""
        self._began_s = self._clock()

    def begun(self, work: Work) -> None:
        """The piece has begun ``work`` and computes on."""
        self._flights.append(_Flight(work, began_s=self._clock()))

    def compute_ends(self, work: Work | None) -> None:
        """The piece has yielded ``work``, or has returned."""
        self._ended_s = self._clock()
        self._compute_s += self._ended_s - self._began_s
        if work is not None and all(flight.work is not work for flight in self._flights):
            self._flights.append(_Flight(work, began_s=self._ended_s))

    def wait_begins(self, work: Work) -> None:
        """``work`` is waited for."""
        flight = next(flight for flight in self._flights if flight.work is work)
        # Where nothing was computed since it began, nothing is hidden: not even the time that this takes.
        flight.wait_began_s = flight.began_s if flight.began_s == self._ended_s else self._clock()
        self._awaited = flight

    def wait_ends(self, result: Tensor) -> None:
        """The work has come to its end."""
        now_s = self._clock()
        flight, self._awaited = self._awaited, None
        assert flight is not None, "what ends was waited for"
        self._flights.remove(flight)
        waited_s = now_s - flight.wait_began_s
        expected_s = self._estimate_s(result)
        ended_s = now_s
        if waited_s <= _AT_ONCE * expected_s:
            ended_s = min(flight.began_s + expected_s, flight.wait_began_s) + waited_s
        self._works += 1
        self._exposed_s += waited_s
        # Two works share the wire while both are in flight: that time counts once.
        self._wire_s += max(0.0, ended_s - max(flight.began_s, self._wire_until_s))
        self._wire_until_s = max(self._wire_until_s, ended_s)

    def forget(self) -> None:
        """A step failed: forget what was in flight."""
        self._flights.clear()
        self._awaited = None
