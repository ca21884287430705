"""How much memory steps take at their fullest moment, looked at from a thread beside them."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import TracebackType

from .measure import MeasuredRank, process_bytes
from .points import StepPoint

_PERIOD_S = 0.002


class MemoryWatch:
    """Looks at the process's memory every two milliseconds while a block runs."""

    def __init__(self) -> None:
        self.peak_bytes = process_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="slipstream-memory", daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(_PERIOD_S):
            self.peak_bytes = max(self.peak_bytes, process_bytes())


def peak_of(rank: MeasuredRank, points: Iterable[StepPoint]) -> int:
    """Return the most memory that the process had while each of these steps ran once. Units: bytes"""
    with MemoryWatch() as watch:
        for point in points:
            rank.once(point)
    return watch.peak_bytes
