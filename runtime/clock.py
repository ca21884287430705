"""Time as an argument: the one place that reads a clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime

Clock = Callable[[], float]
"""Returns seconds, monotonic."""

monotonic_clock: Clock = time.monotonic

processor_clock: Clock = time.process_time
"""Seconds that processors have worked for this process."""

wall_clock: Clock = time.time
"""Seconds since 1970: for dates that people and other programs read, never for durations."""


def strftime_now(layout: str) -> str:
    """Return the local date or time in a ``strftime`` layout; chat templates ask for it."""
    return datetime.now().strftime(layout)
