"""Which part of what a rank shall receive has been written: every byte once, none twice. Pure.

Counts in parts (a layer and the run of heads that one rank sends of it) and token positions. Numbers only: where the
bytes lie is not known here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto


class Claim(Enum):
    """What came of asking to write."""

    NEW = auto()
    DUPLICATE = auto()
    """All of it was claimed before."""
    OUTSIDE = auto()
    """Some of it is not expected, or some of it was claimed before and some was not."""


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """Heads of a layer, from one rank of the source. Heads and layers are the model's."""

    layer: int
    first_head: int
    num_heads: int
    source: int


class Coverage:
    """The parts of one transfer at one rank, for the same run of tokens each."""

    def __init__(self, parts: Iterable[Part], tokens: range) -> None:
        self._tokens = tokens
        # Ends of claimed runs, by part: starts and stops apart, ascending, so that a look-up is a bisection.
        self._claimed: dict[Part, tuple[list[int], list[int]]] = {part: ([], []) for part in parts}
        self._missing = len(self._claimed) * len(tokens)

    @property
    def complete(self) -> bool:
        """Whether all that was expected has been applied."""
        return self._missing == 0

    def claim(self, part: Part, first: int, stop: int) -> Claim:
        """Ask for a run of tokens of a part; it is claimed when the answer is NEW."""
        runs = self._claimed.get(part)
        if runs is None or not self._tokens.start <= first < stop <= self._tokens.stop:
            return Claim.OUTSIDE
        starts, stops = runs
        at = bisect_right(starts, first)
        if at and stops[at - 1] > first:
            return Claim.DUPLICATE if stops[at - 1] >= stop else Claim.OUTSIDE
        if at < len(starts) and starts[at] < stop:
            return Claim.OUTSIDE
        # Neighbours become one run, so that a prompt in order is one run however many frames it has.
        if at and stops[at - 1] == first:
            stops[at - 1] = stop
            if at < len(starts) and starts[at] == stop:
                stops[at - 1] = stops.pop(at)
                del starts[at]
        elif at < len(starts) and starts[at] == stop:
            starts[at] = first
        else:
            starts.insert(at, first)
            stops.insert(at, stop)
        return Claim.NEW

    def applied(self, tokens: int) -> None:
        """Note that a claimed run was written and checked."""
        self._missing -= tokens
        assert self._missing >= 0, "more was applied than was claimed"
