"""How long to wait before something is tried again: longer each time, short again after one that lasted.

Pure: how long the last one lasted is an argument, and so is whatever spreads many that wait for the same thing.
"""

from __future__ import annotations

from collections.abc import Callable

Jitter = Callable[[float], float]
"""From a pause to the one that is taken, in seconds; where many wait, it is random and up to the pause."""


def no_jitter(pause_s: float) -> float:
    """Return a pause as it is."""
    return pause_s


class Backoff:
    """The pauses of one thing that is tried again. ``stable_after_s``: what lasted so long has not failed."""

    def __init__(
        self,
        *,
        first_s: float = 0.5,
        longest_s: float = 30.0,
        stable_after_s: float = 60.0,
        jitter: Jitter = no_jitter,
    ) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._stable_after_s = stable_after_s
        self._jitter = jitter
        self._pause_s = first_s

    def pause_s(self, *, lasted_s: float) -> float:
        """Return the pause after a try that lasted so long."""
        if lasted_s >= self._stable_after_s:
            self._pause_s = self._first_s
        pause_s, self._pause_s = self._pause_s, min(self._pause_s * 2, self._longest_s)
        return self._jitter(pause_s)
