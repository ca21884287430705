"""What is still heard of requests that have been answered: tasks of their own, bounded in number and in time.

Nobody waits for them. One event loop's own; they end with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

_MOST = 1024
_TIMEOUT_S = 5.0


class Afterwards:
    """Things that are done when their request has ended."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """Return how many are on their way."""
        return len(self._tasks)

    @property
    def full(self) -> bool:
        """Whether there are so many that no more are taken."""
        return len(self._tasks) >= _MOST

    def begin(self, what: Coroutine[None, None, None]) -> None:
        """Do something, for a bounded time; what it raises is its own business."""
        task = asyncio.get_running_loop().create_task(_within_time(what), name="afterwards")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _within_time(what: Coroutine[None, None, None]) -> None:
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            await what
    except TimeoutError:
        return
