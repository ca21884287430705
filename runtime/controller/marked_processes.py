"""Processes by what they have in their environment: what a deployment has started, whoever keeps it or does not.

A process carries its deployment's mark, and so does all that it starts. A process number alone says little: numbers
are used again, and what was started by a process is not known to whoever started that.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

from .launch import MARK_VARIABLE

_LOOK_PERIOD_S = 0.05
_SAME_S = 1.0
"""How far apart two readings of one process' birth may be: it is counted from when the machine was started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMark:
    """One process, once. Units: born_s, since 1970"""

    pid: int
    born_s: float


def marked(mark: str) -> list[int]:
    """Return the processes of this node, of this user, that carry a mark; this one is not among them."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and _runs(process) and process.environ().get(MARK_VARIABLE) == mark:
                found.append(process.pid)
    return found


def end_marked(mark: str) -> None:
    """End the processes of this node, of this user, that carry a mark."""
    for pid in marked(mark):
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            # Looked at again: the number may have become another's since.
            if process.environ().get(MARK_VARIABLE) == mark:
                process.kill()


def process_mark(pid: int) -> ProcessMark | None:
    """Return what tells a process from all others that ever had its number, None if it is not there or has ended."""
    try:
        process = psutil.Process(pid)
        return ProcessMark(pid=pid, born_s=process.create_time()) if _runs(process) else None
    except psutil.Error:
        return None


def end_tree(wanted: ProcessMark, *, patience_s: float) -> bool:
    """Ask a process to end, and end it and all that it has started when it has not in time; whether it was there."""
    there = process_mark(wanted.pid)
    if there is None or abs(there.born_s - wanted.born_s) > _SAME_S:
        return False
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(wanted.pid)
        tree = [process, *process.children(recursive=True)]
        process.terminate()
        for each in _living_after(tree, patience_s=patience_s):
            with contextlib.suppress(psutil.Error):
                each.kill()
        _living_after(tree, patience_s=patience_s)
    return True


def _living_after(processes: Iterable[psutil.Process], *, patience_s: float) -> list[psutil.Process]:
    """Wait until all have ended, for a while, and return those that have not."""
    living, never = list(processes), threading.Event()
    for _ in range(int(patience_s / _LOOK_PERIOD_S) + 1):
        living = [process for process in living if _runs(process)]
        if not living:
            break
        never.wait(_LOOK_PERIOD_S)
    return living


def _runs(process: psutil.Process) -> bool:
    """Whether a process runs: one that has ended is listed until somebody asks how, and perhaps nobody does."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
