"""How often each expert is held, and which slots share a rank, for one layer.

Owns the two searches behind a balanced placement. ``replica_counts`` gives the spare slots to whichever expert's
replicas are heaviest. ``pack`` puts items (replicas; or whole groups of experts) into bins (ranks; or hosts), as many
into each, so that the heaviest bin is light: heaviest items first into the lightest bin that has room, then exchanges
between the heaviest bin and others until it is good enough. Items of one owner never share a bin. Everything is
deterministic: ties go to the lowest index.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heapreplace
from itertools import combinations

MOST_EXCHANGES_PER_BIN = 8
"""Bounds the work of ``even_out``; seldom reached."""

PAIRS_HELP = range(4, 13)
"""Sizes of bins where exchanges of two items are tried when none of one helps.

In smaller bins they are exchanges of one seen from the other side, in larger ones there are enough of one.
"""

MOST_PARTNERS = 6
"""Where an exchange with one of so many light bins helps, the rest are not asked: the next exchange may."""

ROUNDING = 1e-9
"""Gains below this part of a bin's load are rounding."""


def replica_counts(loads: Sequence[float], num_slots: int, *, most: int) -> list[int]:
    """Choose the replicas of every expert: ``num_slots`` in all, at most ``most`` each, the heaviest one light.

    Shapes: loads [experts]; returns [experts], at least 1 each
    """
    experts = len(loads)
    if not experts <= num_slots <= experts * most:
        raise ValueError(f"num_slots must be {experts} to {experts * most}, got {num_slots}")
    counts = [1] * experts
    if most == 1:
        return counts
    # Among equals the one with fewer replicas, so that layers without any load spread evenly too.
    heaviest = [(-load, 1, expert) for expert, load in enumerate(loads)]
    heapify(heaviest)
    for _ in range(num_slots - experts):
        _, count, expert = heaviest[0]
        counts[expert] = count = count + 1
        if count == most:
            heappop(heaviest)
        else:
            heapreplace(heaviest, (-loads[expert] / count, count, expert))
    return counts


def pack(loads: Sequence[float], owners: Sequence[int], num_bins: int, *, target: float) -> list[list[int]]:
    """Put the items into bins, equally many each, until mean over heaviest is ``target`` or no exchange helps.

    Shapes: loads, owners [items], a multiple of num_bins, no owner with more items than bins; returns [bins][items]
    """
    bins = _deal(loads, owners, num_bins)
    # No bin can be lighter than the heaviest item beside the lightest ones, so nothing better is searched for.
    least = max(loads) + sum(sorted(loads)[: len(loads) // num_bins - 1])
    even_out(bins, loads, owners, limit=max(least, sum(loads) / num_bins / target))
    return bins


def even_out(bins: list[list[int]], loads: Sequence[float], owners: Sequence[int], *, limit: float) -> float:
    """Exchange items between bins, in place, until none is heavier than ``limit`` or no exchange helps.

    Shapes: bins [bins][items]; loads, owners [items]
    Returns the load of the heaviest bin.
    """
    weights = [sum([loads[item] for item in items]) for items in bins]
    if max(weights) <= limit:
        return max(weights)
    hands = _Hands(bins, loads)
    holds = [{owners[item] for item in items} for items in bins]
    sizes = (1, 2) if len(bins[0]) in PAIRS_HELP else (1,)
    for _ in range(MOST_EXCHANGES_PER_BIN * len(bins)):
        heavy = weights.index(max(weights))
        if weights[heavy] <= limit:
            break
        for size in sizes:
            found = _best_exchange(hands, owners, weights, holds, heavy, size, limit)
            if found is not None:
                break
        else:
            break
        light, given, taken = found
        bins[heavy] = [item for item in bins[heavy] if item not in given] + list(taken)
        bins[light] = [item for item in bins[light] if item not in taken] + list(given)
        for index in (heavy, light):
            hands.forget(index)
            weights[index] = sum([loads[item] for item in bins[index]])
            holds[index] = {owners[item] for item in bins[index]}
    return max(weights)


def _deal(loads: Sequence[float], owners: Sequence[int], num_bins: int) -> list[list[int]]:
    room = len(loads) // num_bins
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    holds: list[set[int]] = [set() for _ in range(num_bins)]
    lightest = [(0.0, index) for index in range(num_bins)]
    for item in sorted(range(len(loads)), key=loads.__getitem__, reverse=True):
        owner = owners[item]
        passed = []
        while lightest and owner in holds[lightest[0][1]]:
            passed.append(heappop(lightest))
        if lightest:
            weight, index = lightest[0]
            bins[index].append(item)
            if len(bins[index]) == room:
                heappop(lightest)
            else:
                heapreplace(lightest, (weight + loads[item], index))
        else:
            weight, roomy = passed.pop(0)
            index, out = _way_out(bins, holds, loads, owners, item, roomy)
            bins[index].remove(out)
            bins[index].append(item)
            bins[roomy].append(out)
            holds[index].discard(owners[out])
            holds[roomy].add(owners[out])
            if len(bins[roomy]) < room:
                heappush(lightest, (weight + loads[out], roomy))
        holds[index].add(owner)
        for entry in passed:
            heappush(lightest, entry)
    return bins


def _way_out(
    bins: list[list[int]],
    holds: list[set[int]],
    loads: Sequence[float],
    owners: Sequence[int],
    item: int,
    roomy: int,
) -> tuple[int, int]:
    """Find a full bin without the item's owner and what it can hand to ``roomy`` for it: the closest in load.

    There always is one: the full bin has more items than ``roomy``, which holds the owner, and it does not.
    """
    candidates = [
        (abs(loads[out] - loads[item]), index, out)
        for index, items in enumerate(bins)
        if owners[item] not in holds[index]
        for out in items
        if owners[out] not in holds[roomy]
    ]
    _, index, out = min(candidates)
    return index, out


class _Hands:
    """The ways to pick one or two items of a bin, by load; kept until the bin changes."""

    def __init__(self, bins: list[list[int]], loads: Sequence[float]) -> None:
        self._bins = bins
        self._loads = loads
        self._known: dict[tuple[int, int], tuple[list[float], list[tuple[int, ...]]]] = {}

    def of(self, index: int, size: int) -> tuple[list[float], list[tuple[int, ...]]]:
        """Return the picks of a bin: their loads, ascending, and their items."""
        known = self._known.get((index, size))
        if known is None:
            loads = self._loads
            picks = sorted(
                [(sum([loads[item] for item in pick]), pick) for pick in combinations(self._bins[index], size)]
            )
            known = ([load for load, _ in picks], [pick for _, pick in picks])
            self._known[index, size] = known
        return known

    def forget(self, index: int) -> None:
        """Take note that a bin has changed."""
        for size in (1, 2):
            self._known.pop((index, size), None)


def _best_exchange(
    hands: _Hands,
    owners: Sequence[int],
    weights: list[float],
    holds: list[set[int]],
    heavy: int,
    size: int,
    limit: float,
) -> tuple[int, tuple[int, ...], tuple[int, ...]] | None:
    """Find an exchange of ``size`` items that leaves the heaviest bin and its partner much lighter.

    Returns (partner, items given, items taken), or None where none helps.
    """
    top = weights[heavy]
    peak = top * (1 - ROUNDING)
    best = None
    own, gifts = hands.of(heavy, size)
    for asked, light in enumerate(sorted(range(len(weights)), key=weights.__getitem__)):
        gap = top - weights[light]
        # Partners come lightest first; the best that this one or a later could do is to meet in the middle.
        if top - gap / 2 >= peak or (best and (asked >= MOST_PARTNERS or peak <= limit)):
            break
        others, returns = hands.of(light, size)
        for load, given in zip(own, gifts, strict=True):
            # The two that lie around what would even out the bins.
            at = bisect_left(others, load - gap / 2)
            for near in (at - 1, at):
                if not 0 <= near < len(others):
                    continue
                shift = load - others[near]
                after = top - min(shift, gap - shift)
                if after < peak:
                    taken = returns[near]
                    if _may_change(given, owners, holds[light]) and _may_change(taken, owners, holds[heavy]):
                        peak = after
                        best = (light, given, taken)
    return best


def _may_change(items: tuple[int, ...], owners: Sequence[int], held: set[int]) -> bool:
    return all([owners[item] not in held for item in items])
