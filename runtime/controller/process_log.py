"""The last lines that a process has printed, numbered from its first, bounded in lines and in bytes.

Whoever reads along asks for what comes after the last line that it has; what has gone by meanwhile is counted, not
passed over.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from itertools import islice

MAX_LINES = 4_000
MAX_BYTES = 1 << 20
PAGE_LINES = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPage:
    """Lines in a row. ``next``: the number of the line after them. ``missed``: lines before them that are gone."""

    lines: tuple[str, ...] = ()
    next: int = 0
    missed: int = 0


class ProcessLog:
    """Lines, added by one thread and read by others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: deque[str] = deque()
        self._bytes = 0
        self._dropped = 0

    def add(self, line: str) -> None:
        """Add a line; the oldest go when there are too many."""
        with self._lock:
            self._lines.append(line)
            self._bytes += len(line)
            while len(self._lines) > MAX_LINES or self._bytes > MAX_BYTES:
                self._bytes -= len(self._lines.popleft())
                self._dropped += 1

    def page(self, begin: int) -> LogPage:
        """Return lines from a number on, a page at most; a number below 0 counts from the end."""
        with self._lock:
            end = self._dropped + len(self._lines)
            begin = max(end + begin, self._dropped) if begin < 0 else begin
            first = min(max(begin, self._dropped), end)
            skip = first - self._dropped
            lines = tuple(islice(self._lines, skip, skip + PAGE_LINES))
        return LogPage(lines=lines, next=first + len(lines), missed=max(0, first - begin))
