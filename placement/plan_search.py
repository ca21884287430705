"""The search for plans: degrees and numbers of replicas for every pool, the devices of every rank, ranked by a goal.

Every cut that a pool's constraint and the model allow is an option. Options go together with all counts that the
devices may hold, by arithmetic alone; the best of these are then really placed, rank by rank, and judged again on the
links that they got.

Owns the order of that. What a plan is worth comes from ``plan_figures``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from .assign import Placer
from .model_cut import Cut
from .plan import Degrees, PoolPlan, ReplicaPlace, Role, Shortage
from .plan_counts import ReplicaCounts
from .plan_figures import Figures, Group, combine
from .plan_memory import EngineLimits
from .plan_options import Option, PoolOptions
from .question import PoolRequest, Question, RankedPlan, Ranking
from .replica_links import ReplicaLinks, link_between, replica_links
from .topology import DeviceRef, Link

MOST_PLACED = 24
"""Combinations that are really placed, of those that split prefill from decode and of the others."""

MOST_TAKEN = 1500
"""Replicas placed for each of the two, after the first few combinations: bounds the time on a large cluster."""

_FEW = 4

MOST_ALIKE = 3
"""Of them, those that differ in numbers of replicas alone."""

Structure = tuple[tuple[str, str, Degrees], ...]
"""Pool, type of device and degrees of each pool: what makes two plans the same but for numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sketch:
    """Options with counts, before anything is placed."""

    options: tuple[Option, ...]
    counts: tuple[int, ...]
    figures: Figures

    @property
    def structure(self) -> Structure:
        return tuple(
            (option.request.name, option.rates.cost.device.name, option.rates.cost.cut.degrees)
            for option in self.options
        )


def search(question: Question) -> Ranking:
    """Return the best plans that can be placed, none where nothing can."""
    return _Search(question).run()


def figures_of(question: Question, pools: Sequence[PoolPlan], limits: Mapping[str, EngineLimits]) -> Figures:
    """Return what pools that are placed already will do. ``limits``: by pool"""
    return _figures_of(question, pools, limits, PoolOptions(question))


class _Search:
    def __init__(self, question: Question) -> None:
        self._question = question
        self._free: tuple[DeviceRef, ...] = tuple(question.topology.devices())
        self._options = PoolOptions(question)
        self._counts = ReplicaCounts(question.workload.requests_per_s)
        self._links: dict[tuple[frozenset[str], frozenset[str]], Link] = {}

    def run(self) -> Ranking:
        goal = self._question.objectives.goal
        sketches = [sketch for pools in self._question.alternatives for sketch in self._sketches(pools)]
        tried: dict[Structure, int] = {}
        best: dict[Structure, RankedPlan] = {}
        placed, taken = {True: 0, False: 0}, {True: 0, False: 0}
        for sketch in sorted(sketches, key=lambda sketch: sketch.figures.rank(goal)):
            alike, kind = tried.get(sketch.structure, 0), sketch.figures.split
            enough = placed[kind] >= _FEW and taken[kind] >= MOST_TAKEN
            if alike == MOST_ALIKE or placed[kind] == MOST_PLACED or enough:
                continue
            tried[sketch.structure] = alike + 1
            placed[kind] += 1
            taken[kind] += sum(sketch.counts)
            plan = self._placed(sketch)
            if plan is not None:
                known = best.get(sketch.structure)
                if known is None or plan.figures.rank(goal) < known.figures.rank(goal):
                    best[sketch.structure] = plan
        plans = sorted(best.values(), key=lambda plan: plan.figures.rank(goal))
        return Ranking(plans=tuple(plans), refused=tuple(self._options.refused))

    def _sketches(self, pools: Sequence[PoolRequest]) -> Iterator[_Sketch]:
        """Yield an alternative's options, in all combinations and counts that arithmetic allows."""
        goal = self._question.objectives.goal
        for options in product(*(self._options.of(pool) for pool in pools)):
            link = self._kv_link_of(options)

            def judge(
                counts: Sequence[int], options: Sequence[Option] = options, link: Link | None = link
            ) -> tuple[float, ...]:
                return self._figures(options, counts, link).rank(goal)

            for counts in self._counts.of(options, judge):
                yield _Sketch(options=options, counts=counts, figures=self._figures(options, counts, link))

    def _figures(self, options: Sequence[Option], counts: Sequence[int], link: Link | None) -> Figures:
        groups = [
            Group(pool=option.request.name, rates=option.rates, count=count)
            for option, count in zip(options, counts, strict=True)
            if count
        ]
        return combine(groups, link, self._question.workload, self._question.objectives)

    def _kv_link_of(self, options: Sequence[Option]) -> Link | None:
        """Return the slowest link that KV may have to take; None without a split."""
        sides = [
            frozenset(node for option in options if option.request.role is role for node in option.nodes)
            for role in (Role.PREFILL, Role.DECODE)
        ]
        if not all(sides):
            return None
        key = (sides[0], sides[1])
        if key not in self._links:
            first, second = (
                [ReplicaPlace(devices=tuple(device for device in self._free if device.node in side))] for side in sides
            )
            self._links[key] = link_between(self._question.topology, first, second)
        return self._links[key]

    def _placed(self, sketch: _Sketch) -> RankedPlan | None:
        """Give every rank a device; with fewer replicas than sketched where they do not all fit."""
        placer = Placer(self._question.topology, self._free, like=self._options.placer)
        # Large replicas first: small ones fit into what they leave.
        order = sorted(range(len(sketch.options)), key=lambda index: (-sketch.options[index].ranks, index))
        places: dict[int, list[ReplicaPlace]] = {index: [] for index in order}
        for index in order:
            option, wanted = sketch.options[index], sketch.counts[index]
            for _ in range(wanted):
                place = placer.take(
                    option.rates.cost.cut.degrees, option.constraint, pool=option.request.name, others=places[index]
                )
                if isinstance(place, Shortage):
                    break
                places[index].append(place)
            if len(places[index]) < max(option.request.least, min(1, wanted)):
                return None
        pools = tuple(
            PoolPlan(
                name=option.request.name,
                role=option.request.role,
                degrees=option.rates.cost.cut.degrees,
                replicas=tuple(places[index]),
                constraint=option.request.constraint,
            )
            for index, option in enumerate(sketch.options)
        )
        limits = {option.request.name: option.request.limits for option in sketch.options}
        return RankedPlan(pools=pools, figures=_figures_of(self._question, pools, limits, self._options))


def _figures_of(
    question: Question, pools: Sequence[PoolPlan], limits: Mapping[str, EngineLimits], options: PoolOptions
) -> Figures:
    """Return what placed pools will do, on the links that their replicas have."""
    topology = question.topology
    counts: dict[tuple[str, ReplicaLinks, str], int] = {}
    for pool in pools:
        for place in pool.replicas:
            key = (
                pool.name, replica_links(topology, place, pool.degrees), topology.device_type(place.devices[0]).name
            )  # fmt: skip
            counts[key] = counts.get(key, 0) + 1
    by_name = {pool.name: pool for pool in pools}
    groups = []
    for (name, links, device), count in counts.items():
        pool = by_name[name]
        cut = Cut(model=question.model, degrees=pool.degrees)
        rates = options.rates_of(pool.role, limits[name], cut, topology.device_types[device], links)
        groups.append(Group(pool=name, rates=rates, count=count))
    sides = [
        [place for pool in pools if pool.role is role for place in pool.replicas]
        for role in (Role.PREFILL, Role.DECODE)
    ]
    link = link_between(topology, *sides) if all(sides) else None
    return combine(groups, link, question.workload, question.objectives)
