"""How many replicas each pool of a plan may have: the combinations that the devices hold.

Owns the enumeration: all numbers of one pool, of two pools with what the one leaves the other; with more pools one
replica after the other goes where it helps most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .plan_options import SMALL, Option

_MOST_COUNTS = 24
"""Numbers of replicas of a pool that are tried."""

Judge = Callable[[Sequence[int]], tuple[float, ...]]
"""Numbers of replicas, pool by pool → what plans are sorted by."""


class ReplicaCounts:
    """Counts for options of pools that share a cluster's free devices."""

    def __init__(self, demand: float | None) -> None:
        """Take the requests per second that are to be served, if that is known."""
        self._demand = demand

    def of(self, options: tuple[Option, ...], judge: Judge) -> Iterator[tuple[int, ...]]:
        """Yield numbers of replicas that the devices may hold."""
        if len(options) <= 2:
            yield from self._of_two(options)
            return
        counts = tuple(option.request.least for option in options)
        while self._fits(options, counts):
            yield counts
            more = [
                (*counts[:index], count + 1, *counts[index + 1 :])
                for index, count in enumerate(counts)
                if count < options[index].capacity
            ]
            more = [each for each in more if self._fits(options, each)]
            if not more:
                return
            counts = min(more, key=judge)

    def _of_two(self, options: tuple[Option, ...]) -> Iterator[tuple[int, ...]]:
        first = options[0]
        for count in _tried(first, self._demand):
            if len(options) == 1:
                yield (count,)
                continue
            second = options[1]
            room = self._room_beside(first, count, second)
            if room < max(1, second.request.least):
                continue
            # As many as keep up with the other pool, or as fit: both sides of where the slower one changes.
            pace = count * first.rates.fullest.requests_per_s / second.rates.fullest.requests_per_s
            near = {int(pace), int(pace) + 1} if first.request.role is not second.request.role else set()
            values = range(second.request.least, room + 1) if room <= SMALL else near
            if self._demand is not None:
                near.add(int(self._demand / second.rates.fullest.requests_per_s) + 1)
            for other in sorted({*values, *near, room}):
                if second.request.least <= other <= room and other > 0:
                    yield count, other

    def _room_beside(self, first: Option, count: int, second: Option) -> int:
        """Return how many replicas of another pool the devices may hold beside those of the first."""
        if first.nodes.isdisjoint(second.nodes):
            return second.capacity
        # All devices of the first may be among the second's.
        return min(second.capacity, max(0, second.free - count * first.ranks) // second.ranks)

    def _fits(self, options: Sequence[Option], counts: Sequence[int]) -> bool:
        """Say whether there are devices enough, counted by nodes that pools share."""
        for option in options:
            inside = [index for index, other in enumerate(options) if other.nodes <= option.nodes]
            if sum(counts[index] * options[index].ranks for index in inside) > option.free:
                return False
        return all(count <= option.capacity for option, count in zip(options, counts, strict=True)) and any(counts)


def _tried(option: Option, demand: float | None) -> list[int]:
    """Return the numbers of replicas to try, ascending: all where they are few, else spread out, and what is asked."""
    least, most = max(1, option.request.least), option.capacity
    if most - least < _MOST_COUNTS:
        return list(range(least, most + 1))
    ratio = (most / least) ** (1 / (_MOST_COUNTS - 1))
    values = {round(least * ratio**index) for index in range(_MOST_COUNTS)} | {least, most}
    if demand is not None:
        needed = int(demand / option.rates.fullest.requests_per_s) + 1
        values |= {needed, needed + 1}
    return sorted(value for value in values if least <= value <= most)
