"""A bounded hand-over of commands from any thread to the engine's own.

The engine's thread sleeps here while it has nothing to do, and looks in between two steps while it has.
"""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Inbox(Generic[Item]):
    """Items on their way to one thread, in order."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._items: list[Item] = []
        self._closed = False

    def put(self, item: Item, *, limit: int | None = None) -> bool:
        """Hand over an item, from any thread; return False when ``limit`` items wait already, or nobody takes them."""
        with self._condition:
            if self._closed or (limit is not None and len(self._items) >= limit):
                return False
            self._items.append(item)
            if len(self._items) == 1:
                self._condition.notify()
            return True

    @property
    def closed(self) -> bool:
        """Whether nobody takes items any more."""
        return self._closed

    def close(self) -> None:
        """Take no more items, and let the taker have None from now on. Idempotent."""
        with self._condition:
            self._closed = True
            self._condition.notify()

    def take(self, *, wait_s: float | None) -> list[Item] | None:
        """Wait up to ``wait_s`` seconds, None without limit, and take all items; None once closed."""
        with self._condition:
            if not self._items and not self._closed and wait_s != 0:
                self._condition.wait(wait_s)
            items, self._items = self._items, []
            return None if self._closed else items
