"""A bounded hand-over of things from any thread to one task of an event loop.

Owns the wake-up across threads: at most one is on its way at a time, whatever the number of things. Bounded in what
they weigh, not in their number, because a step's news may be of any size. Knows nothing of what they mean.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from .session import Event, event_weight

Thing = TypeVar("Thing")


class HandOver(Generic[Thing]):
    """Things on their way to one receiver; ``weigh`` says what one counts towards ``max_weight``."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, weigh: Callable[[Thing], int], max_weight: int) -> None:
        self._loop = loop
        self._weigh = weigh
        self._max_weight = max_weight
        self._lock = threading.Lock()
        self._things: list[Thing] = []
        self._weight = 0
        self._finished = False
        self._waking = False
        self._ready = asyncio.Event()

    def put(self, things: list[Thing]) -> bool:
        """Hand over things, from any thread; return False, and take none, when the receiver is too far behind.

        While nothing waits any are taken: what one step brings is bounded by the step.
        """
        weight = sum(map(self._weigh, things))
        with self._lock:
            if self._finished:
                return True
            if self._things and self._weight + weight > self._max_weight:
                return False
            self._things += things
            self._weight += weight
            waking, self._waking = self._waking, True
        if not waking:
            self._wake()
        return True

    def finish(self, last: list[Thing], *, discard: bool = False) -> None:
        """Hand over the last things, from any thread; with ``discard`` in place of those not yet received."""
        with self._lock:
            if self._finished:
                return
            self._finished = True
            self._things = last if discard else [*self._things, *last]
        self._wake()

    async def get(self) -> list[Thing]:
        """Wait for things and take all there are; return [] when nothing more will come."""
        while True:
            with self._lock:
                things, self._things, self._weight = self._things, [], 0
                self._waking = False
                if things or self._finished:
                    return things
                self._ready.clear()
            await self._ready.wait()

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:
            # The receiver's event loop is closed: there is nobody left to hand over to.
            with self._lock:
                self._finished = True
                self._things = []


class Outbox(HandOver[Event]):
    """Events on their way to one receiver.

    Units: max_weight, numbers held (see ``event_weight``)
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *, max_weight: int) -> None:
        super().__init__(loop, weigh=event_weight, max_weight=max_weight)
