"""Time as an argument: the one place that reads a clock."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Returns seconds, monotonic."""

monotonic_clock: Clock = time.monotonic
