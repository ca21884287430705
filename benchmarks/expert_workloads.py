"""Made-up loads of experts, and a router with hidden groups, for benchmarks and tests of expert placement."""

from __future__ import annotations

import random


def lognormal_loads(layers: int, experts: int, *, seed: int, sigma: float = 1.0) -> list[list[float]]:
    """Return loads whose logarithm is normal.

    Shapes: [layers][experts]
    """
    draw = random.Random(seed)
    return [[draw.lognormvariate(0, sigma) for _ in range(experts)] for _ in range(layers)]


def zipf_loads(layers: int, experts: int, *, seed: int, exponent: float) -> list[list[float]]:
    """Return loads that fall with their rank to the power of ``exponent``, in an order of its own in every layer.

    Shapes: [layers][experts]
    """
    draw = random.Random(seed)
    loads = [(place + 1) ** -exponent for place in range(experts)]
    return [draw.sample(loads, experts) for _ in range(layers)]


def drifted(loads: list[list[float]], *, sigma: float, seed: int) -> list[list[float]]:
    """Return the loads, each times a lognormal factor.

    Shapes: loads and result [layers][experts]
    """
    draw = random.Random(seed)
    return [[load * draw.lognormvariate(0, sigma) for load in layer] for layer in loads]


class PlantedRouter:
    """A router whose tokens choose mostly inside one of several hidden groups of experts.

    Units: inside, part of a token's choices that are made in its group
    """

    def __init__(self, *, experts: int, groups: int, top_k: int, inside: float, seed: int) -> None:
        if top_k > experts // groups and inside == 1.0:
            raise ValueError(f"top_k must be at most the {experts // groups} experts of a group, got {top_k}")
        self._draw = random.Random(seed)
        order = self._draw.sample(range(experts), experts)
        self._groups = [order[index::groups] for index in range(groups)]
        self._experts = experts
        self._top_k = top_k
        self._inside = inside

    def token(self) -> tuple[int, ...]:
        """Return the experts that one token chooses."""
        group = self._draw.choice(self._groups)
        chosen: set[int] = set()
        while len(chosen) < self._top_k:
            near = self._draw.random() < self._inside
            chosen.add(self._draw.choice(group) if near else self._draw.randrange(self._experts))
        return tuple(sorted(chosen))

    def batch(self, ranks: int, tokens: int) -> list[list[tuple[int, ...]]]:
        """Return tokens for every rank.

        Shapes: [ranks][tokens][top_k]
        """
        return [[self.token() for _ in range(tokens)] for _ in range(ranks)]
