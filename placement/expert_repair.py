"""A layer's placement made better in small steps, replicas and places together.

Owns the search for the next step. It serves twice: to follow loads with few experts on the wire, and to go on where
choosing replicas first and places second ends above what is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from .expert_packing import ROUNDING

Step: TypeAlias = tuple[tuple[int, int, int], ...]
"""Replacements that belong together: on which rank, which expert goes, which comes."""


class Repair:
    """A layer's placement that is being changed step by step, and its load.

    A step writes over a replica that its expert can spare (one move) or exchanges two experts (two moves). Every step
    makes the heaviest rank lighter without making another as heavy.
    """

    def __init__(self, ranks: Sequence[Sequence[int]], loads: Sequence[float], reach: int) -> None:
        self.ranks = [list(experts) for experts in ranks]
        self.loads = loads
        self.reach = reach  # experts go no further than among so many neighbouring ranks
        self.holders: list[set[int]] = [set() for _ in loads]
        for rank, experts in enumerate(ranks):
            for expert in experts:
                self.holders[expert].add(rank)
        self.shares = [load / len(held) for load, held in zip(loads, self.holders, strict=True)]
        self.weights = [self._weight(rank) for rank in range(len(ranks))]

    def run(self, limit: float, *, most_moves: int) -> bool:
        """Take steps until no rank is above the limit; return False where no step leads there, or too many would."""
        moves = 0
        while moves <= most_moves:
            heavy = self.weights.index(max(self.weights))
            top = self.weights[heavy]
            if top <= limit:
                return True
            peak, step = self._best_overwrite(heavy, top * (1 - ROUNDING))
            # An overwrite moves less than an exchange: where it is good enough there is nothing to compare.
            if peak > limit:
                peak, step = min((peak, step), self._best_exchange(heavy, peak), key=lambda found: found[0])
            if not step:
                return False
            self._take(step)
            moves += len(step)
        return False

    def _weight(self, rank: int) -> float:
        return sum([self.shares[expert] for expert in self.ranks[rank]])

    def _near(self, rank: int) -> range:
        first = rank - rank % self.reach
        return range(first, first + self.reach)

    def _best_overwrite(self, heavy: int, peak: float) -> tuple[float, Step]:
        """Find the spare replica to replace by one of heavy's experts, or of heavy's own by another's.

        Returns the heaviest of the ranks that it changes, below ``peak``, and the step; no step where there is none.
        """
        best: Step = ()
        near = self._near(heavy)
        everybody = sorted({expert for rank in near for expert in self.ranks[rank]})
        for rank in near:
            offered = everybody if rank == heavy else self.ranks[heavy]
            for out in self.ranks[rank]:
                if len(self.holders[out]) == 1:
                    continue
                for into in offered:
                    # Most are too heavy already where they would go.
                    arriving = self.loads[into] / (len(self.holders[into]) + 1)
                    after = self.weights[rank] - self.shares[out] + arriving
                    if after >= peak or rank in self.holders[into]:
                        continue
                    after = max(after, self._peak_elsewhere(rank, out, into))
                    if after < peak:
                        peak, best = after, ((rank, out, into),)
        return peak, best

    def _peak_elsewhere(self, rank: int, out: int, into: int) -> float:
        """Return the heaviest of the other ranks that ``into`` instead of ``out`` on a rank changes the load of."""
        rise = self.loads[out] / (len(self.holders[out]) - 1) - self.shares[out]
        fall = self.shares[into] - self.loads[into] / (len(self.holders[into]) + 1)
        held, gained = self.holders[out], self.holders[into]
        return max(
            self.weights[other] + (rise if other in held else 0.0) - (fall if other in gained else 0.0)
            for other in held | gained
            if other != rank
        )

    def _best_exchange(self, heavy: int, peak: float) -> tuple[float, Step]:
        """Find the exchange with another rank; the result is as of ``_best_overwrite``."""
        best: Step = ()
        top = self.weights[heavy]
        for rank in self._near(heavy):
            gap = top - self.weights[rank]
            if top - gap / 2 >= peak:
                continue
            for out in self.ranks[heavy]:
                if rank in self.holders[out]:
                    continue
                for into in self.ranks[rank]:
                    shift = self.shares[out] - self.shares[into]
                    after = top - min(shift, gap - shift)
                    if after < peak and heavy not in self.holders[into]:
                        peak, best = after, ((heavy, out, into), (rank, into, out))
        return peak, best

    def _take(self, step: Step) -> None:
        for rank, out, into in step:
            self.ranks[rank][self.ranks[rank].index(out)] = into
            self.holders[out].remove(rank)
            self.holders[into].add(rank)
        changed = {expert for _, out, into in step for expert in (out, into)}
        for expert in changed:
            self.shares[expert] = self.loads[expert] / len(self.holders[expert])
        for rank in {rank for expert in changed for rank in self.holders[expert]}.union(rank for rank, _, _ in step):
            self.weights[rank] = self._weight(rank)
