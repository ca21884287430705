"""The ranks of one replica, packed into a region of nodes: groups into fast domains, stages around groups.

Owns the order in which devices are taken. First it finds the fastest domains that hold all tensor-parallel groups,
whole; then each stage takes the nearest of them. Any choice of whole groups within those domains leaves room for the
rest, so nothing has to be taken back.

Nodes are indices, devices of a node are indices; ranks count with tp fastest, then ep, then pp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .link_domains import LinkDomain
from .plan import Degrees

ANY_SPEED = 1 << 30
"""The speed where no link is needed: above all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Devices in the order of ranks, and the speeds of the slowest group and of the slowest stage."""

    devices: tuple[tuple[int, int], ...]
    speeds: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Nodes in which a replica may be as a whole, the link between any two, and the domains inside, small first.

    ``values``: the failure domains that its nodes are in, where those matter.
    """

    nodes: tuple[int, ...]
    speed: int
    domains: tuple[LinkDomain, ...]
    values: tuple[str, ...] = ()

    def shape(self, counts: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Return what makes regions alike: how fast its domains are and how much is free in each.

        Shapes: counts [nodes], free devices
        """
        free = dict(zip(self.nodes, counts, strict=True))
        inside = sorted((domain.speed, sum(free[node] for node in domain.nodes)) for domain in self.domains)
        return ((self.speed, len(self.nodes)), *inside)

    def speeds_at_best(self, free: Mapping[int, int], degrees: Degrees) -> tuple[int, int]:
        """Return the greatest speeds of the slowest group and of the slowest stage that the region has room for."""
        group = self.group_speed(free, degrees)
        if degrees.ep == 1:
            return group, ANY_SPEED
        slots = _Slots(self, group, degrees.tp)
        stages = [domain.speed for domain in self.domains if slots.groups_in(domain, free) >= degrees.ep]
        return group, max(stages, default=self.speed)

    def group_speed(self, free: Mapping[int, int], degrees: Degrees) -> int:
        """Return the greatest speed at which all tensor-parallel groups fit."""
        if degrees.tp == 1:
            return ANY_SPEED
        needed = degrees.pp * degrees.ep
        for speed in sorted({domain.speed for domain in self.domains} | {self.speed}, reverse=True):
            if sum(_count(domain, free) // degrees.tp for domain in _widest(self, speed)) >= needed:
                return speed
        raise AssertionError("a region has at least as many devices as the replica has ranks")


def pack(region: Region, free: Mapping[int, Sequence[int]], degrees: Degrees) -> Packed:
    """Choose the devices of one replica; the region has enough.

    ``free``: the free devices of each node
    """
    counts = {node: len(devices) for node, devices in free.items()}
    slots = _Slots(region, region.group_speed(counts, degrees), degrees.tp)
    taking = _Taking(free, counts)
    whole = LinkDomain(nodes=region.nodes, speed=region.speed)
    slowest_group = slowest_stage = ANY_SPEED
    home: LinkDomain | None = None
    for stage in range(degrees.pp):
        home = _stage_home(region, slots, counts, degrees, home, stages_left=degrees.pp - stage) or whole
        place: LinkDomain | None = None
        for group in range(degrees.ep):
            place = _group_home(home, slots, counts, degrees.tp, place, groups_left=degrees.ep - group)
            taking.take(place, degrees.tp)
            if degrees.tp > 1:
                slowest_group = min(slowest_group, place.speed)
        if degrees.ep > 1:
            slowest_stage = min(slowest_stage, home.speed)
    return Packed(devices=tuple(taking.devices), speeds=(slowest_group, slowest_stage))


class _Slots:
    """The widest domains that are fast enough for a tensor-parallel group: each holds whole groups only."""

    def __init__(self, region: Region, speed: int, tp: int) -> None:
        self.tp = tp
        self._slots = _widest(region, speed)
        self._domains = region.domains
        self._slot_of = {node: index for index, slot in enumerate(self._slots) for node in slot.nodes}
        self._inside: dict[tuple[int, ...], tuple[LinkDomain, ...]] = {}

    def groups_in(self, domain: LinkDomain, free: Mapping[int, int]) -> int:
        """Return how many groups fit into a domain, each inside a slot."""
        by_slot: dict[int, int] = {}
        for node in domain.nodes:
            slot = self._slot_of.get(node)
            if slot is not None:
                by_slot[slot] = by_slot.get(slot, 0) + free[node]
        return sum(count // self.tp for count in by_slot.values())

    def homes(self, domain: LinkDomain) -> tuple[LinkDomain, ...]:
        """Return the domains inside another, and inside a slot, in which a group may be."""
        known = self._inside.get(domain.nodes)
        if known is None:
            nodes = frozenset(domain.nodes)
            known = tuple(
                inner
                for inner in (*self._domains, *self._slots)
                if nodes.issuperset(inner.nodes) and len({self._slot_of.get(node) for node in inner.nodes}) == 1
                and inner.nodes[0] in self._slot_of
            )  # fmt: skip
            # A slot may reach beyond the domain: its part inside is a home as well.
            known += tuple(
                LinkDomain(nodes=part, speed=slot.speed)
                for slot in self._slots
                if (part := tuple(node for node in slot.nodes if node in nodes)) and part != slot.nodes
            )
            self._inside[domain.nodes] = known
        return known


class _Taking:
    """Takes devices one after the other."""

    def __init__(self, free: Mapping[int, Sequence[int]], counts: dict[int, int]) -> None:
        self._free = free
        self._counts = counts
        self.devices: list[tuple[int, int]] = []

    def take(self, domain: LinkDomain, count: int) -> None:
        """Take so many devices of a domain, of as few nodes as can be."""
        for node in sorted(domain.nodes, key=lambda node: (-self._counts[node], node)):
            devices = self._free[node]
            first = len(devices) - self._counts[node]
            some = min(count, self._counts[node])
            self.devices += [(node, device) for device in devices[first : first + some]]
            self._counts[node] -= some
            count -= some
            if count == 0:
                return
        raise AssertionError("a domain that was chosen has enough devices")


def _stage_home(
    region: Region,
    slots: _Slots,
    free: Mapping[int, int],
    degrees: Degrees,
    last: LinkDomain | None,
    *,
    stages_left: int,
) -> LinkDomain | None:
    """Return the fastest domain for a stage: the last one's, the tightest that holds all that are left, the largest."""
    fitting = [(domain, groups) for domain in region.domains if (groups := slots.groups_in(domain, free)) >= degrees.ep]
    if not fitting:
        return None
    needed = degrees.ep * stages_left

    def key(entry: tuple[LinkDomain, int]) -> tuple[int, bool, bool, int, int, tuple[int, ...]]:
        domain, groups = entry
        speed = 0 if degrees.ep == 1 and degrees.tp == 1 else -domain.speed
        enough = groups >= needed
        return speed, domain != last, not enough, groups if enough else -groups, len(domain.nodes), domain.nodes

    return min(fitting, key=key)[0]


def _group_home(
    stage: LinkDomain, slots: _Slots, free: Mapping[int, int], tp: int, last: LinkDomain | None, *, groups_left: int
) -> LinkDomain:
    """Return the fastest domain for a group: the last one's, the tightest with room for all, else the largest."""

    def key(domain: LinkDomain) -> tuple[int, bool, bool, int, int, tuple[int, ...]]:
        count = _count(domain, free)
        enough = count >= tp * groups_left
        speed = 0 if tp == 1 else -domain.speed
        return speed, domain != last, not enough, count if enough else -count, len(domain.nodes), domain.nodes

    return min((domain for domain in slots.homes(stage) if _count(domain, free) >= tp), key=key)


def _widest(region: Region, speed: int) -> tuple[LinkDomain, ...]:
    """Return the largest domains of a region that are at least so fast; no two have a node in common."""
    if speed == ANY_SPEED or region.speed >= speed:
        return (LinkDomain(nodes=region.nodes, speed=region.speed),)
    chosen: list[LinkDomain] = []
    covered: set[int] = set()
    for domain in sorted(region.domains, key=lambda domain: -len(domain.nodes)):
        if domain.speed >= speed and covered.isdisjoint(domain.nodes):
            chosen.append(domain)
            covered.update(domain.nodes)
    return tuple(sorted(chosen, key=lambda domain: domain.nodes))


def _count(domain: LinkDomain, free: Mapping[int, int]) -> int:
    return sum(free[node] for node in domain.nodes)
