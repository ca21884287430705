"""Threads that wait, so that callers need not: as many as there are waits at a time, each used again.

Knows nothing of what is waited for. A wait has its own deadline; ending the threads waits for none of them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class Waiters:
    """Daemon threads that run one call after the other."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._free = 0
        self._ended = False

    def start(self, call: Callable[[], None]) -> None:
        """Run a call, which does not raise, in a thread that is free, or a new one; nothing after ``end``."""
        with self._lock:
            if self._ended:
                return
            self._calls.put(call)
            if self._free:
                self._free -= 1
                return
            self._threads += 1
        threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def end(self) -> None:
        """Have every thread end once it is free. Idempotent."""
        with self._lock:
            if not self._ended:
                self._ended = True
                for _ in range(self._threads):
                    self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            # What the call held must not live until the next one.
            del call
            with self._lock:
                self._free += 1
