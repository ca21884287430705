"""Keeps the threads that gloo starts from pushing running threads off their CPU.

Gloo's thread wakes for every message and takes the CPU of the very thread that is posting the next transfer, which
holds the lock that gloo's thread then spins for: milliseconds go by, on few cores for every operation. A batch thread
waits until the CPU is free or the running thread's time is up.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def started_threads_yield() -> Iterator[None]:
    """Make batch threads of those that this process starts meanwhile; where there are none such, change nothing."""
    if not hasattr(os, "SCHED_BATCH"):
        yield
        return
    before = _threads()
    yield
    for thread in _threads() - before:
        try:
            os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
        except OSError:
            # It has ended, or it may not be changed here: it is slower, and no less right.
            continue


def _threads() -> set[int]:
    return {int(entry.name) for entry in Path("/proc/self/task").iterdir()}
