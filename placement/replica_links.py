"""The links that a replica's ranks talk over: the slowest of each kind, because everybody waits for it.

Owns the walk over groups. Ranks count with tp fastest, then ep, then pp. A link is taken to be a device's own: pairs
of devices use theirs at the same time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from .plan import Degrees, ReplicaPlace
from .topology import DeviceRef, Link, Node, Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLinks:
    """Slowest links of a replica; None where no two ranks need one.

    ``tp``: within tensor-parallel groups. ``experts``: among the ranks that experts are spread over. ``stages``: from a
    stage to the next. ``crosses_nodes``: tp groups span nodes.
    """

    tp: Link | None
    experts: Link | None
    stages: Link | None
    crosses_nodes: bool


NO_LINKS = ReplicaLinks(tp=None, experts=None, stages=None, crosses_nodes=False)
"""The links of a replica of one rank."""


def replica_links(topology: Topology, place: ReplicaPlace, degrees: Degrees) -> ReplicaLinks:
    """Return the links of one replica."""
    nodes = {device.node: topology.node(device.node) for device in place.devices}
    tp, ep = degrees.tp, degrees.ep
    groups = [place.devices[first : first + tp] for first in range(0, len(place.devices), tp)]
    stages = [place.devices[first : first + tp * ep] for first in range(0, len(place.devices), tp * ep)]
    over_tp = [_between(topology, nodes, a, b) for group in groups for a, b in combinations(_one_each(group), 2)]
    spread = [stage[offset::tp] for stage in stages for offset in range(tp)] if ep > 1 else []
    over_experts = [_between(topology, nodes, a, b) for group in spread for a, b in combinations(_one_each(group), 2)]
    onward = [
        _between(topology, nodes, a, b) for one, next_ in pairwise(stages) for a, b in zip(one, next_, strict=True)
    ]
    return ReplicaLinks(
        tp=slowest(over_tp),
        experts=slowest(over_tp) if degrees.experts_over_tp else slowest(over_experts),
        stages=slowest(onward),
        crosses_nodes=any(len({device.node for device in group}) > 1 for group in groups),
    )


def link_between(topology: Topology, sources: Sequence[ReplicaPlace], targets: Sequence[ReplicaPlace]) -> Link:
    """Return the slowest link from a device of some replicas to one of others."""
    ours = {device.node: device for place in sources for device in place.devices}
    theirs = {device.node: device for place in targets for device in place.devices}
    nodes = {name: topology.node(name) for name in {*ours, *theirs}}
    found = slowest(_between(topology, nodes, a, b) for a in ours.values() for b in theirs.values())
    assert found is not None, "both sides have a device"
    return found


def slowest(links: Iterable[Link]) -> Link | None:
    """Return the link that takes longest for a large message, with the longest latency of all; None for none."""
    every = list(links)
    if not every:
        return None
    return Link(bytes_per_s=min(link.bytes_per_s for link in every), latency_s=max(link.latency_s for link in every))


def _one_each(group: Sequence[DeviceRef]) -> list[DeviceRef]:
    """Return the devices that tell a group's links: two of a node stand for all of it."""
    taken: dict[str, int] = {}
    chosen = []
    for device in group:
        taken[device.node] = taken.get(device.node, 0) + 1
        if taken[device.node] <= 2:
            chosen.append(device)
    return chosen


def _between(topology: Topology, nodes: dict[str, Node], a: DeviceRef, b: DeviceRef) -> Link:
    if a.node == b.node:
        return nodes[a.node].device_link
    return topology.node_link(nodes[a.node], nodes[b.node])
