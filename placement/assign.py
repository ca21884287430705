"""Which device each rank of a replica gets.

Owns the choice, by what matters most first: no tensor-parallel group over a slow link while a fast one is free; then
the ranks of a stage close together; then failure domains that other replicas do not use yet; then stages close
together; then holes left as large as can be. All ranks of a replica run on one type of device. Deterministic: ties go
to the node that the topology names first.

A node's own link is taken to be the fastest it has: a group that fits into a node is never spread over several.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .link_domains import LinkDomain, link_domains
from .pack_ranks import ANY_SPEED, Region, pack
from .plan import Constraint, Degrees, ReplicaPlace, Shortage
from .shortages import shortage
from .topology import DeviceRef, Topology


def assign(
    topology: Topology,
    free: Collection[DeviceRef],
    degrees: Degrees,
    constraint: Constraint,
    *,
    pool: str = "",
    others: Sequence[ReplicaPlace] = (),
) -> ReplicaPlace | Shortage:
    """Choose devices among the free ones for one replica, or say what is missing.

    ``others``: the pool's other replicas, whose failure domains are to be avoided. For many replicas: ``Placer``.
    """
    return Placer(topology, free).take(degrees, constraint, pool=pool, others=others)


class Placer:
    """Devices that are free, and the choice among them; what is chosen is no longer free."""

    def __init__(self, topology: Topology, free: Collection[DeviceRef], *, like: Placer | None = None) -> None:
        """Take the devices that may be used; those that the topology does not have are ignored.

        ``like``: another placer of the same topology, whose knowledge of it is shared.
        """
        self._topology = topology
        self._domains: tuple[LinkDomain, ...] = link_domains(topology) if like is None else like._domains
        self._index_of = {node.name: index for index, node in enumerate(topology.nodes)}
        self._free: list[list[int]] = [[] for _ in topology.nodes]
        for device in sorted(set(free)):
            index = self._index_of.get(device.node)
            if index is not None and device.index < topology.nodes[index].devices:
                self._free[index].append(device.index)
        # What a constraint leaves of the nodes and domains does not change as devices are taken.
        self._regions: dict[tuple[tuple[int, ...], str | None], tuple[Region, ...]] = (
            {} if like is None else like._regions
        )
        self._allowed_nodes: dict[object, tuple[tuple[int, ...], ...]] = {} if like is None else like._allowed_nodes

    @property
    def free(self) -> tuple[DeviceRef, ...]:
        """The devices that are still free, in the topology's order."""
        return tuple(
            DeviceRef(node=node.name, index=index)
            for node, indices in zip(self._topology.nodes, self._free, strict=True)
            for index in indices
        )

    def take(
        self, degrees: Degrees, constraint: Constraint, *, pool: str = "", others: Sequence[ReplicaPlace] = ()
    ) -> ReplicaPlace | Shortage:
        """Choose devices for one replica and take them; take nothing when there are too few."""
        used = self._used_values(constraint.spread, others)
        candidates = [
            candidate
            for allowed in self._allowed(constraint)
            for candidate in self._candidates(allowed, degrees, constraint.spread, used)
        ]
        if not candidates:
            return shortage(self._topology, self._free, degrees, constraint, pool=pool)
        chosen = min(candidates, key=lambda candidate: candidate.key)
        for node, index in chosen.devices:
            self._free[node].remove(index)
        names = [node.name for node in self._topology.nodes]
        return ReplicaPlace(devices=tuple(DeviceRef(node=names[node], index=index) for node, index in chosen.devices))

    def _allowed(self, constraint: Constraint) -> tuple[tuple[int, ...], ...]:
        """Return, for every type of device, the nodes that have it and that the constraint allows."""
        key = (constraint.device_types, constraint.nodes, tuple(sorted(constraint.labels.items())))
        if key not in self._allowed_nodes:
            by_type: dict[str, list[int]] = {}
            for index, node in enumerate(self._topology.nodes):
                if constraint.allows(node):
                    by_type.setdefault(node.device_type, []).append(index)
            self._allowed_nodes[key] = tuple(tuple(nodes) for nodes in by_type.values())
        return self._allowed_nodes[key]

    def _used_values(self, spread: str | None, others: Sequence[ReplicaPlace]) -> Mapping[str, int]:
        """Count, for each value of the label, the replicas that a failure of its domain takes."""
        counts: dict[str, int] = {}
        if spread is not None:
            for other in others:
                names = {device.node for device in other.devices}
                for value in {self._value(self._index_of[name], spread) for name in names if name in self._index_of}:
                    counts[value] = counts.get(value, 0) + 1
        return counts

    def _candidates(
        self, allowed: tuple[int, ...], degrees: Degrees, spread: str | None, used: Mapping[str, int]
    ) -> Iterator[_Candidate]:
        """Yield places in regions from small to large, one of equals, until larger ones can only be worse."""
        regions = self._regions_of(allowed, spread)
        everywhere = max(regions, key=lambda region: len(region.nodes))
        if sum(len(self._free[node]) for node in allowed) < degrees.ranks:
            return
        ideal = everywhere.speeds_at_best({node: len(self._free[node]) for node in allowed}, degrees)
        there = [node for node in allowed if self._free[node]]
        least_used = min((used.get(value, 0) for value in self._values(there, spread)), default=0)
        best: _Candidate | None = None
        seen = set()
        for region in regions:
            counts = [len(self._free[node]) for node in region.nodes]
            if sum(counts) < degrees.ranks:
                continue
            if best is not None and best.region_size < len(region.nodes) and best.reaches(ideal, least_used):
                return
            uses = tuple(sorted(used.get(value, 0) for value in region.values))
            shape = (region.shape(counts), uses)
            if shape in seen:
                continue
            seen.add(shape)
            candidate = self._candidate(region, degrees, spread, used)
            if best is None or candidate.key < best.key:
                best = candidate
            yield candidate

    def _regions_of(self, allowed: tuple[int, ...], spread: str | None) -> tuple[Region, ...]:
        """Return where a replica may be as a whole: every domain, every value of the spread label; small ones first."""
        known = self._regions.get((allowed, spread))
        if known is not None:
            return known
        domains = _restricted(self._domains, allowed)
        sets = {domain.nodes: domain.speed for domain in domains}
        everywhere = domains[-1].speed
        values = self._values(allowed, spread)
        for value in values if spread is not None else ():
            nodes = tuple(node for node in allowed if self._value(node, spread) == value)
            sets.setdefault(nodes, everywhere)
        regions = tuple(
            Region(
                nodes=nodes,
                speed=speed,
                domains=_restricted(domains, nodes),
                values=self._values(nodes, spread),
            )
            for nodes, speed in sorted(sets.items(), key=lambda item: (len(item[0]), item[0]))
        )
        self._regions[allowed, spread] = regions
        return regions

    def _candidate(self, region: Region, degrees: Degrees, spread: str | None, used: Mapping[str, int]) -> _Candidate:
        packed = pack(region, {node: self._free[node] for node in region.nodes}, degrees)
        touched = {node for node, _ in packed.devices}
        values = self._values(tuple(touched), spread) if spread is not None else ()
        left = sum(len(self._free[node]) for node in touched) - len(packed.devices)
        worst_use = max((used.get(value, 0) for value in values), default=0)
        stages = region.speed if degrees.pp > 1 and len(touched) > 1 else ANY_SPEED
        return _Candidate(
            devices=packed.devices,
            speeds=packed.speeds,
            worst_use=worst_use,
            region_size=len(region.nodes),
            key=(
                -packed.speeds[0], -packed.speeds[1], worst_use, len(values), -stages, left,
                packed.devices,
            ),
        )  # fmt: skip

    def _value(self, node: int, spread: str | None) -> str:
        there = self._topology.nodes[node]
        # A node that does not say where it is fails by itself.
        return there.name if spread is None else there.labels.get(spread, there.name)

    def _values(self, nodes: Collection[int], spread: str | None) -> tuple[str, ...]:
        """Return the failure domains of some nodes; none without a label to spread over."""
        if spread is None:
            return ()
        return tuple(sorted({self._value(node, spread) for node in nodes}))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A place for a replica. ``devices``: (node, device) in the order of ranks; the lowest ``key`` is the best."""

    devices: tuple[tuple[int, int], ...]
    speeds: tuple[int, int]
    worst_use: int
    region_size: int
    key: tuple[int, int, int, int, int, int, tuple[tuple[int, int], ...]]

    def reaches(self, ideal: tuple[int, int], least_used: int) -> bool:
        """Say whether no larger region can have a better place, stages' nearness included."""
        return self.speeds >= ideal and self.worst_use == least_used


def _restricted(domains: Sequence[LinkDomain], allowed: tuple[int, ...]) -> tuple[LinkDomain, ...]:
    """Return what is left of domains within some nodes, one for each set of nodes, small ones first."""
    inside = frozenset(allowed)
    left: dict[tuple[int, ...], int] = {}
    for domain in domains:
        nodes = domain.nodes if inside.issuperset(domain.nodes) else tuple(n for n in domain.nodes if n in inside)
        if nodes:
            # The smallest domain with these nodes says how they are linked.
            left.setdefault(nodes, domain.speed)
    ordered = sorted(left.items(), key=lambda item: (len(item[0]), item[0]))
    return tuple(LinkDomain(nodes=nodes, speed=speed) for nodes, speed in ordered)
