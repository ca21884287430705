"""The ways in which one pool's replicas can be cut, each judged on the best place that one replica can have.

Owns which cuts are tried and which are kept. Whatever is left out is remembered with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from .assign import Placer
from .model_cut import Cut
from .plan import Constraint, Degrees, Role, Shortage
from .plan_memory import EngineLimits, MemoryTraits, rank_memory
from .question import PoolRequest, Question
from .replica_links import NO_LINKS, ReplicaLinks, replica_links
from .replica_rates import ReplicaRates
from .step_cost import Efficiency, StepCost
from .topology import DeviceType

MOST_OPTIONS = 16
"""Options of a pool that are combined with those of others."""

SMALL = 16
"""Up to so many replicas, every number of them is tried; on so few devices replicas over several nodes count."""

_EVERY_DEGREE = 8
"""Up to so many devices every degree is tried; beyond, powers of two."""

_MOST_RANKS = 64
"""Ranks of a replica on a large cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to cut a pool's replicas, on one type of device.

    ``capacity``: how many may fit at most. ``nodes``: where they may be; ``free``: the free devices there.
    """

    request: PoolRequest
    constraint: Constraint
    rates: ReplicaRates
    capacity: int
    nodes: frozenset[str]
    free: int

    @property
    def ranks(self) -> int:
        return self.rates.cost.cut.degrees.ranks


class PoolOptions:
    """Finds the options of a question's pools."""

    def __init__(self, question: Question) -> None:
        """Take the question; every device that the topology has free may be used."""
        self._question = question
        self.placer = Placer(question.topology, tuple(question.topology.devices()))
        self._rates: dict[tuple[Role, EngineLimits, str, Degrees, ReplicaLinks], ReplicaRates] = {}
        self.refused: dict[str, None] = {}

    def of(self, pool: PoolRequest) -> list[Option]:
        topology, found = self._question.topology, []
        allowed = [node for node in topology.nodes if pool.constraint.allows(node) and node.free]
        if not allowed:
            self._refuse(f"pool {pool.name!r}: no node with free devices is allowed")
        for name in dict.fromkeys(node.device_type for node in allowed):
            nodes = [node for node in allowed if node.device_type == name]
            free = [len(node.free) for node in nodes]
            constraint = replace(pool.constraint, device_types=frozenset((name,)))
            for degrees in self._degrees(pool, sum(free)):
                rates = self._rates_on_best_place(pool, constraint, degrees, topology.device_types[name])
                if rates is None:
                    continue
                capacity = sum(count // degrees.ranks for count in free)
                if capacity == 0 or sum(free) <= SMALL:
                    # Replicas over several nodes count as well.
                    capacity = sum(free) // degrees.ranks
                capacity = min(capacity, pool.most) if pool.most is not None else capacity
                if capacity < pool.least:
                    self._refuse(
                        f"pool {pool.name!r}: {pool.least} replicas of {_cut(degrees)} on {name} need "
                        f"{pool.least * degrees.ranks} devices, {sum(free)} are free"
                    )
                    continue
                found.append(
                    Option(
                        request=pool,
                        constraint=constraint,
                        rates=rates,
                        capacity=capacity,
                        nodes=frozenset(node.name for node in nodes),
                        free=sum(free),
                    )
                )
        return self._kept(found)

    def _rates_on_best_place(
        self, pool: PoolRequest, constraint: Constraint, degrees: Degrees, device: DeviceType
    ) -> ReplicaRates | None:
        """Return what a replica does where it can be best, None where it cannot be."""
        cut = Cut(model=self._question.model, degrees=degrees)
        problem = cut.problem()
        if problem is not None:
            if pool.degrees is not None:
                self._refuse(f"pool {pool.name!r}: {problem}")
            return None
        without = self.rates_of(pool.role, pool.limits, cut, device, NO_LINKS)
        problem = without.problem()
        if problem is not None:
            self._refuse(f"pool {pool.name!r}: {_cut(degrees)} on {device.name}: {problem}")
            return None
        place = Placer(self._question.topology, self.placer.free, like=self.placer).take(
            degrees, constraint, pool=pool.name
        )
        if isinstance(place, Shortage):
            self._refuse(place.why)
            return None
        links = replica_links(self._question.topology, place, degrees)
        rates = self.rates_of(pool.role, pool.limits, cut, device, links)
        if not rates.points:
            self._refuse(f"pool {pool.name!r}: {_cut(degrees)} on {device.name}: prompts leave no time to decode")
            return None
        return rates

    def rates_of(
        self, role: Role, limits: EngineLimits, cut: Cut, device: DeviceType, links: ReplicaLinks
    ) -> ReplicaRates:
        key = (role, limits, device.name, cut.degrees, links)
        if key not in self._rates:
            question = self._question
            traits = question.traits.get(device.name, MemoryTraits())
            self._rates[key] = ReplicaRates(
                role=role,
                cost=StepCost(
                    cut=cut,
                    device=device,
                    links=links,
                    efficiency=question.efficiencies.get(device.name, Efficiency()),
                ),
                memory=rank_memory(cut, limits, device_bytes=device.memory_bytes, traits=traits),
                limits=limits,
                workload=question.workload,
                objectives=question.objectives,
            )
        return self._rates[key]

    def _degrees(self, pool: PoolRequest, devices: int) -> Iterator[Degrees]:
        """Yield the cuts to try: those that the model allows and that so many devices can hold."""
        if pool.degrees is not None:
            yield pool.degrees
            return
        model = self._question.model
        most = min(devices, _MOST_RANKS)
        steps = [n for n in range(1, most + 1) if devices <= _EVERY_DEGREE or n & (n - 1) == 0]
        tps = [tp for tp in range(1, most + 1) if model.attention.heads % tp == 0]
        for tp, pp, ep in product(tps, steps, steps if model.experts else [1]):
            if tp * pp * ep <= most:
                yield Degrees(tp=tp, pp=pp, ep=ep)
                if tp > 1 and ep == 1 and model.experts:
                    yield Degrees(tp=tp, pp=pp, experts_over_tp=True)

    def _kept(self, options: list[Option]) -> list[Option]:
        """Return the options worth combining: the best per device, per cost, and by either time."""
        if len(options) <= MOST_OPTIONS:
            return options

        def per_device(option: Option) -> float:
            return -option.rates.fullest.requests_per_s / option.ranks

        def per_cost(option: Option) -> float:
            device = option.rates.cost.device
            return per_device(option) / (device.price_per_hour or 1.0)

        def keeping(option: Option) -> tuple[bool, float]:
            return not option.rates.fullest.keeps(self._question.objectives), per_device(option)

        def first_token(option: Option) -> float:
            return option.rates.points[0].first_token_s

        def per_token(option: Option) -> float:
            return option.rates.points[0].per_token_s

        chosen: dict[int, Option] = {}
        for key in (keeping, per_device, per_cost, first_token, per_token):
            for option in sorted(options, key=key)[: MOST_OPTIONS // 4]:
                chosen.setdefault(id(option), option)
        return list(chosen.values())

    def _refuse(self, reason: str) -> None:
        self.refused.setdefault(reason)


def _cut(degrees: Degrees) -> str:
    spread = ", experts over tp" if degrees.experts_over_tp else ""
    return f"tp={degrees.tp} pp={degrees.pp} ep={degrees.ep}{spread}"
