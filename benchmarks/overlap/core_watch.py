"""How much of a core others used while this process ran on it: what makes a time worth keeping or not.

Linux only. The kernel counts a core's time in ticks, so a tick more or less says nothing.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

CALM = 0.05
"""The share of a core that others may use in a round that counts as calm."""
_STAT = Path("/proc/stat")
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class CoreWatch:
    """Watches one core, on which all of this process' threads run."""

    def __init__(self, core: int) -> None:
        self._name = f"cpu{core}"
        self.start()

    def start(self) -> None:
        """Watch from now on."""
        self._began = self._now()

    def others_share(self) -> float:
        """Return the share of the time since ``start`` in which other processes ran on the core."""
        passed_s, busy_s, own_s = (now - began for now, began in zip(self._now(), self._began, strict=True))
        return max(0.0, busy_s - own_s - _TICK_S) / passed_s

    def _now(self) -> tuple[float, float, float]:
        """Return the clock, the seconds in which the core ran processes, and those of this one."""
        for line in _STAT.read_text().splitlines():
            name, *ticks = line.split()
            if name == self._name:
                # User, nice and system; interrupts, which carry our own packets, are counted elsewhere.
                return time.perf_counter(), sum(map(int, ticks[:3])) * _TICK_S, time.process_time()
        raise ValueError(f"{_STAT} has no {self._name}")
