"""How long a replica's decode step takes with so many sequences, learned from its load reports.

A core. A step that decodes reads all weights once, whatever its rows, and every sequence's own KV besides: a straight
line over sequences, fitted to recent reports, older ones counting less and less.
"""

from __future__ import annotations

_KEPT = 0.98
_FIXED_SHARE = 0.5
"""Of a step, while reports have not differed enough to tell what a sequence adds."""
_LEAST_SPREAD = 0.5
"""Standard deviation in sequences, below which they have not."""


class DecodePace:
    """One replica's line."""

    __slots__ = ("_last", "_mean_s", "_mean_x", "_weight", "_xs", "_xx")

    def __init__(self) -> None:
        self._weight = self._mean_x = self._mean_s = self._xx = self._xs = 0.0
        self._last = (0, 0.0)

    @property
    def measured(self) -> bool:
        """Whether anything is known."""
        return self._weight > 0

    def note(self, sequences: int, token_s: float) -> None:
        """Take in a report; one that says the same as the last is the last one again, one of nobody is of no use."""
        if token_s <= 0 or sequences < 1 or (sequences, token_s) == self._last:
            return
        self._last = (sequences, token_s)
        self._weight = _KEPT * self._weight + 1.0
        self._xx, self._xs = _KEPT * self._xx, _KEPT * self._xs
        off_x, off_s = sequences - self._mean_x, token_s - self._mean_s
        self._mean_x += off_x / self._weight
        self._mean_s += off_s / self._weight
        self._xx += off_x * (sequences - self._mean_x)
        self._xs += off_x * (token_s - self._mean_s)

    def token_s(self, sequences: float) -> float:
        """Return how long a step with so many sequences is thought to take."""
        assert self.measured, "nothing is known of this replica's steps"
        at, seconds = self._last
        if self._xx < _LEAST_SPREAD**2 * self._weight:
            return seconds * (_FIXED_SHARE + (1 - _FIXED_SHARE) * max(sequences, 1) / at)
        # Never falling with sequences, and never from below nothing: noise may say either.
        slope = min(max(self._xs / self._xx, 0.0), self._mean_s / max(self._mean_x, 1.0))
        return self._mean_s + slope * (max(sequences, 1) - self._mean_x)
