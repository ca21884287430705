"""Why a replica cannot be placed, as a sentence that says which resource is missing and where.

Owns the wording. The decision that nothing fits has been made by ``assign``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .plan import Constraint, Degrees, Shortage
from .topology import Node, Topology

_MOST_NAMED = 6
"""Nodes that a sentence names; of the others it gives the number."""


def shortage(
    topology: Topology, free: Sequence[Sequence[int]], degrees: Degrees, constraint: Constraint, *, pool: str
) -> Shortage:
    """Say what a replica lacks.

    Shapes: free [nodes][free devices of the node]
    """
    by_type: dict[str, list[tuple[Node, int]]] = {}
    refused = []
    for node, devices in zip(topology.nodes, free, strict=True):
        if constraint.allows(node):
            by_type.setdefault(node.device_type, []).append((node, len(devices)))
        else:
            refused.append(node)
    most = max(by_type, key=lambda name: sum(count for _, count in by_type[name]), default=None)
    nodes = by_type[most] if most is not None else []
    found = sum(count for _, count in nodes)
    replica = f"a replica of pool {pool!r}" if pool else "a replica"
    parts = [f"{replica} needs {degrees.ranks} free devices of one type ({_cut(degrees)})"]
    if most is None:
        parts.append(f"no node is allowed{_wanted(constraint)}")
    else:
        where = _list(f"{count} on {node.name}" for node, count in nodes if count)
        there = sum(node.devices for node, _ in nodes)
        parts.append(
            f"{found} of the {there} of type {most} on {len(nodes)} allowed nodes are free" + (where and f": {where}")
        )
    if refused and most is not None:
        parts.append(f"left out{_wanted(constraint)}: {_list(node.name for node in refused)}")
    return Shortage(pool=pool, needed=degrees.ranks, found=found, why="; ".join(parts))


def _cut(degrees: Degrees) -> str:
    return " x ".join(f"{axis}={getattr(degrees, axis)}" for axis in ("pp", "ep", "tp"))


def _wanted(constraint: Constraint) -> str:
    """Return what a node must be, behind a space; nothing where any may be used."""
    wanted = []
    if constraint.device_types:
        wanted.append(f"type {' or '.join(sorted(constraint.device_types))}")
    if constraint.nodes:
        wanted.append(f"named {_list(sorted(constraint.nodes))}")
    wanted += [f"label {label}={value}" for label, value in sorted(constraint.labels.items())]
    return f" by what the pool asks for ({', '.join(wanted)})" if wanted else ""


def _list(items: Iterable[str]) -> str:
    every = list(items)
    named = ", ".join(every[:_MOST_NAMED])
    return named if len(every) <= _MOST_NAMED else f"{named} and {len(every) - _MOST_NAMED} more"
