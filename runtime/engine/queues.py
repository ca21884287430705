"""The two orders that a scheduler keeps: who waits, and who runs, both sorted by the policy's key."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator

import numpy as np

from ..messages import Int32Array
from .policies import OrderKey, SchedulingPolicy
from .sequence import Sequence, SequenceState

_MIN_STALE = 64


class WaitingQueue:
    """Sequences that wait to run, first by policy first out.

    A sequence that ends while it waits stays in the heap until it comes up or stale entries are the larger part.
    """

    def __init__(self, policy: SchedulingPolicy) -> None:
        self._policy = policy
        self._heap: list[tuple[OrderKey, Sequence]] = []
        self._live = 0
        self.tokens = 0
        """Known tokens of those that wait, as many as they were when they came."""

    def __len__(self) -> int:
        return self._live

    def push(self, sequence: Sequence) -> None:
        """Add a sequence."""
        heapq.heappush(self._heap, (self._policy.order_key(sequence), sequence))
        self._live += 1
        sequence.queued = len(sequence.tokens)
        self.tokens += sequence.queued

    def peek(self) -> Sequence | None:
        """Return the sequence that goes next, or None."""
        while self._heap and self._heap[0][1].state is not SequenceState.WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> None:
        """Take out the sequence that ``peek`` returned."""
        _, sequence = heapq.heappop(self._heap)
        self._live -= 1
        self.tokens -= sequence.queued

    def forget(self, sequence: Sequence) -> None:
        """Note that one of the waiting sequences has left the state WAITING by another way than ``pop``."""
        self._live -= 1
        self.tokens -= sequence.queued
        if len(self._heap) > 2 * self._live + _MIN_STALE:
            self._heap = [entry for entry in self._heap if entry[1].state is SequenceState.WAITING]
            heapq.heapify(self._heap)

    def lengths(self) -> Iterator[int]:
        """Return the known tokens of the waiting sequences, one by one in no particular order."""
        return (len(sequence.tokens) for _, sequence in self._heap if sequence.state is SequenceState.WAITING)

    def live(self) -> list[Sequence]:
        """Return the waiting sequences in no particular order."""
        return [sequence for _, sequence in self._heap if sequence.state is SequenceState.WAITING]


class RunningOrder:
    """Running sequences in the policy's order, and their slots as an array."""

    def __init__(self, policy: SchedulingPolicy) -> None:
        self._policy = policy
        self._entries: list[tuple[OrderKey, Sequence]] = []
        self._slots: Int32Array | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, sequence: Sequence) -> None:
        """Insert a sequence that has got its slot."""
        insort(self._entries, (self._policy.order_key(sequence), sequence), key=lambda entry: entry[0])
        self._slots = None

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out."""
        place = bisect_left(self._entries, self._policy.order_key(sequence), key=lambda entry: entry[0])
        assert self._entries[place][1] is sequence, f"{sequence} is not among the running"
        del self._entries[place]
        self._slots = None

    @property
    def last(self) -> Sequence:
        """The sequence that the policy would serve last: the first to be preempted."""
        return self._entries[-1][1]

    @property
    def slots(self) -> Int32Array:
        """Return the running slots in order."""
        if self._slots is None:
            self._slots = np.array([sequence.slot for _, sequence in self._entries], dtype=np.int32)
        return self._slots

    def live(self) -> list[Sequence]:
        """Return the running sequences in order."""
        return [sequence for _, sequence in self._entries]
