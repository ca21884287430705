"""A simple ``Assign`` for tests: the first node with enough free devices, else the first devices of all nodes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from slipstream.placement.plan import Constraint, Degrees, ReplicaPlace, Shortage
from slipstream.placement.topology import DeviceRef, Node, Topology


def first_fit(
    topology: Topology,
    free: Collection[DeviceRef],
    degrees: Degrees,
    constraint: Constraint,
    *,
    pool: str = "",
    others: Sequence[ReplicaPlace] = (),
) -> ReplicaPlace | Shortage:
    """Return the first place that fits, or what is missing."""
    needed = degrees.ranks
    found: list[DeviceRef] = []
    for node in topology.nodes:
        if not allows(constraint, node):
            continue
        here = [device for device in node.free if device in free]
        if len(here) >= needed:
            return ReplicaPlace(devices=tuple(here[:needed]))
        found += here
    if len(found) >= needed:
        return ReplicaPlace(devices=tuple(found[:needed]))
    why = f"{needed} devices are needed and {len(found)} are free on nodes that the pool may use"
    return Shortage(pool=pool, needed=needed, found=len(found), why=why)


def allows(constraint: Constraint, node: Node) -> bool:
    """Whether a pool may run on a node."""
    if constraint.device_types and node.device_type not in constraint.device_types:
        return False
    return all(node.labels.get(key) == value for key, value in constraint.labels.items())
