"""How frames cross from a rank to a rank: the protocol that every transport keeps, and what passes through it.

A transport moves bytes between registered memories and decides nothing: it asks a ``Gate`` before it stores a byte, and
says what became of every frame it took, exactly once. One contract suite holds all of them to that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol, TypeVar

from ..errors import CommMisuse
from .frame import KvFrame, KvHeader
from .incoming import Drop, Incoming, Outcome, Write
from .memory import KvStore
from .outgoing import Post
from .transfer import PeerRank, TransferId

Clock = Callable[[], float]
"""Returns seconds, monotonic."""


AStore = TypeVar("AStore", bound=KvStore)


class Gate(Protocol):
    """Who says what may be written; called from a transport's threads."""

    def admit(self, header: KvHeader, peer: PeerRank) -> Write | Drop:
        """Say whether a frame may be written."""
        ...

    def finish(self, write: Write, outcome: Outcome) -> None:
        """Take note of how a write ended; called once for every write that was admitted."""
        ...


class LockedGate:
    """A gate for several threads: hold ``lock`` for whatever else is done with ``incoming``."""

    def __init__(self, incoming: Incoming) -> None:
        self.incoming = incoming
        self.lock = threading.Lock()

    def admit(self, header: KvHeader, peer: PeerRank) -> Write | Drop:
        """Say whether a frame may be written."""
        with self.lock:
            return self.incoming.admit(header, peer)

    def finish(self, write: Write, outcome: Outcome) -> None:
        """Take note of how a write ended."""
        with self.lock:
            self.incoming.finish(write, outcome)


@dataclass(frozen=True, slots=True)
class Released:
    """A posted frame's memory is no longer read. ``sent``: it went out; the receiver alone knows if it was applied."""

    frame: KvFrame
    sent: bool


@dataclass(frozen=True, slots=True)
class Written:
    """A frame came in and its write is over; the gate knows more."""

    frame: KvFrame
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class PeerDown:
    """No connection is left to, or from, a peer, although nobody here closed it. ``why`` is for people."""

    peer: PeerRank
    why: str


Event = Released | Written | PeerDown


class KvTransport(Protocol):
    """One rank's way of sending frames and of receiving them."""

    def register(self, memory: KvStore) -> None:
        """Use this memory, once, before anything else; it stays where it is until the transport is closed.

        Raises: CommMisuse
        """
        ...

    def post(self, post: Post) -> bool:
        """Take a frame to send, reading its blocks until ``Released``; False when too much is on its way already.

        Never waits. A frame to a peer that is not there is taken, and released unsent.

        Raises: CommMisuse for one that is larger than any may be
        """
        ...

    def poll(self, timeout_s: float) -> list[Event]:
        """Return what happened, waiting until something does or the time is over."""
        ...

    def cancel(self, transfer: TransferId) -> None:
        """Drop what was posted of a transfer and is not going out yet; each such frame is released unsent.

        What is going out goes on, for a bounded time.
        """
        ...

    def close(self) -> None:
        """End everything: every frame is released, every write finished. Idempotent."""
        ...


class Events:
    """What happened, for one who polls; threads add to it. Bounded by what was posted and what was granted.

    Several transports of a rank may share one, so that whoever polls waits in one place.
    """

    def __init__(self) -> None:
        self._events: SimpleQueue[Event | None] = SimpleQueue()

    def add(self, *events: Event) -> None:
        """Add events and wake whoever waits for them."""
        for event in events:
            self._events.put(event)

    def wake(self) -> None:
        """Have whoever waits, or does so next, return without an event: there is something else to do."""
        self._events.put(None)

    def take(self, timeout_s: float) -> list[Event]:
        """Return all events since the last time, waiting for one, or to be woken."""
        found: list[Event | None] = []
        with suppress(Empty):
            found.append(self._events.get(timeout=timeout_s) if timeout_s > 0 else self._events.get_nowait())
            while True:
                found.append(self._events.get_nowait())
        return [event for event in found if event is not None]


def need(memory: AStore | None) -> AStore:
    """Return the registered memory.

    Raises: CommMisuse when there is none
    """
    if memory is None:
        raise CommMisuse("this KV transport has no memory: register it before connecting or posting")
    return memory
