"""A bounded hand-over of events from the engine's thread to one task of an event loop.

Owns the wake-up across threads: at most one is on its way at a time, whatever the number of events. Bounded in numbers
held, not in events, because a step's news may be of any size. Knows nothing of what the events mean.
"""

from __future__ import annotations

import asyncio
import threading

from .session import Event, event_weight


class Outbox:
    """Events on their way to one receiver.

    Units: max_weight, numbers held (see ``event_weight``)
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *, max_weight: int) -> None:
        self._loop = loop
        self._max_weight = max_weight
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._weight = 0
        self._finished = False
        self._waking = False
        self._ready = asyncio.Event()

    def put(self, events: list[Event]) -> bool:
        """Hand over events, from any thread; return False, and take none, when the receiver is too far behind.

        An empty outbox takes any events: what one step brings is bounded by the step.
        """
        weight = sum(map(event_weight, events))
        with self._lock:
            if self._finished:
                return True
            if self._events and self._weight + weight > self._max_weight:
                return False
            self._events += events
            self._weight += weight
            waking, self._waking = self._waking, True
        if not waking:
            self._wake()
        return True

    def finish(self, last: list[Event], *, discard: bool = False) -> None:
        """Hand over the last events, from any thread; with ``discard`` in place of those not yet received."""
        with self._lock:
            if self._finished:
                return
            self._finished = True
            self._events = last if discard else [*self._events, *last]
        self._wake()

    async def get(self) -> list[Event]:
        """Wait for events and take all there are; return [] when nothing more will come."""
        while True:
            with self._lock:
                events, self._events, self._weight = self._events, [], 0
                self._waking = False
                if events or self._finished:
                    return events
                self._ready.clear()
            await self._ready.wait()

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:
            # The receiver's event loop is closed: there is nobody left to hand over to.
            with self._lock:
                self._finished = True
                self._events = []
