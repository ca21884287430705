"""In which order sequences are served: small classes behind one protocol.

A policy sees a sequence's facts and returns a sort key; smaller goes first, and the largest is preempted first.
Keys must not change while a sequence lives, because queues stay sorted by them.
"""

from __future__ import annotations

from typing import Protocol

from .sequence import Sequence

OrderKey = tuple[int, ...]


class SchedulingPolicy(Protocol):
    """Orders sequences, waiting and running alike."""

    name: str

    def order_key(self, sequence: Sequence) -> OrderKey:
        """Return the sort key; smaller is served first and preempted last."""
        ...


class FirstComeFirstServed:
    """Serve in order of arrival."""

    name = "fcfs"

    def order_key(self, sequence: Sequence) -> OrderKey:
        """Return the arrival number, then the index among the request's samples."""
        return (sequence.arrival, sequence.index)


class Priority:
    """Serve lower ``priority`` numbers first, equal ones in order of arrival."""

    name = "priority"

    def order_key(self, sequence: Sequence) -> OrderKey:
        """Return priority, arrival number and index."""
        return (sequence.request.priority, sequence.arrival, sequence.index)


POLICIES: dict[str, type[FirstComeFirstServed] | type[Priority]] = {
    FirstComeFirstServed.name: FirstComeFirstServed,
    Priority.name: Priority,
}
