"""Keeps requests away from what fails again and again, and tries it now and then.

A core: time is an argument. Closed, it lets everything through; after some failures in a row it opens for a while, then
lets one try through in each pause until one succeeds. Each failed try makes the pause longer, up to a bound.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerSettings:
    """``failures`` in a row open it. Units: first_pause_s, longest_pause_s, between tries while it is open"""

    failures: int = 3
    first_pause_s: float = 1.0
    longest_pause_s: float = 30.0


class Breaker:
    """The breaker of one thing that may fail."""

    __slots__ = ("_failures", "_pause_s", "_settings", "_until_s")

    def __init__(self, settings: BreakerSettings) -> None:
        self._settings = settings
        self._failures = 0
        self._pause_s = settings.first_pause_s
        self._until_s = float("-inf")

    @property
    def open(self) -> bool:
        """Whether it is open, trying now and then or not."""
        return self._failures >= self._settings.failures

    def lets(self, now_s: float) -> bool:
        """Return whether a request may go through now."""
        return not self.open or now_s >= self._until_s

    def went(self, now_s: float) -> None:
        """Note that a request goes through: while it is open, that is the one try of this pause."""
        if self.open:
            self._until_s = now_s + self._pause_s

    def failed(self, now_s: float) -> None:
        """Note a failure."""
        self._failures += 1
        if self._failures > self._settings.failures:
            self._pause_s = min(2 * self._pause_s, self._settings.longest_pause_s)
        if self.open:
            self._until_s = now_s + self._pause_s

    def succeeded(self) -> None:
        """Note a success: it closes."""
        self._failures = 0
        self._pause_s = self._settings.first_pause_s
        self._until_s = float("-inf")
