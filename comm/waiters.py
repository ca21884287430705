"""Threads that wait, so that callers need not: as many as there are waits at a time, each used again.

Knows nothing of what is waited for. A wait has its own deadline; ending the threads waits for none of them. Only the
process does, for a moment, before the interpreter is taken down: a daemon thread that comes out of a wait in C++ after
that aborts the process.
"""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable

_EXIT_PATIENCE_S = 1.0


class Waiters:
    """Daemon threads that run one call after the other."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._left = threading.Condition(self._lock)
        self._threads = 0
        self._free = 0
        self._ended = False
        _waiters.add(self)

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

    def join(self, timeout_s: float) -> bool:
        """Wait until every thread has ended; return whether they have."""
        with self._lock:
            return self._left.wait_for(lambda: not self._threads, timeout_s)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            # What the call held must not live until the next one.
            del call
            with self._lock:
                self._free += 1
        with self._lock:
            self._threads -= 1
            self._left.notify_all()


_waiters: weakref.WeakSet[Waiters] = weakref.WeakSet()


def _end_all() -> None:
    for waiters in list(_waiters):
        waiters.end()
    for waiters in list(_waiters):
        waiters.join(_EXIT_PATIENCE_S)


atexit.register(_end_all)
