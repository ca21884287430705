"""Processes by what they have in their environment: what a deployment has started, whoever keeps it or does not.

A process carries its deployment's mark, and so does all that it starts. A process number alone says little: numbers
are used again, and what was started by a process is not known to whoever started that.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

import psutil

from .launch import MARK_VARIABLE

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
            ended = process.status() == psutil.STATUS_ZOMBIE
            if not ended and process.pid != os.getpid() and process.environ().get(MARK_VARIABLE) == mark:
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
    """Return what tells a process from all others that ever had its number, None if it is not there."""
    try:
        return ProcessMark(pid=pid, born_s=psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def end_tree(wanted: ProcessMark, *, patience_s: float) -> bool:
    """Ask a process to end, and end it and all that it has started when it has not in time; whether it was there."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(wanted.pid)
        if abs(process.create_time() - wanted.born_s) > _SAME_S:
            return False
        tree = [process, *process.children(recursive=True)]
        process.terminate()
        _, living = psutil.wait_procs(tree, timeout=patience_s)
        for each in living:
            with contextlib.suppress(psutil.Error):
                each.kill()
        psutil.wait_procs(living, timeout=patience_s)
        return True
    return False
