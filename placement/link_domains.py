"""Groups of nodes that are well linked to one another: the shape of a network as nested sets.

Owns the reading of a topology's links as domains. A domain's ``speed`` is a step on a scale where neighbours are a
quarter apart, so that links of one kind, measured, count as equally fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .topology import Link, Topology

_STEP = 1.25
"""Links that differ by less than about this factor count as equally fast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkDomain:
    """Nodes any two of whose devices are at least so well linked; one node, or several.

    ``nodes``: indices in the topology's order, ascending.
    """

    nodes: tuple[int, ...]
    speed: int


def speed_of(link: Link) -> int:
    """Return the step of the scale on which a link is."""
    return round(math.log(link.bytes_per_s) / math.log(_STEP))


def link_domains(topology: Topology) -> tuple[LinkDomain, ...]:
    """Return every node by itself, and every set of nodes that are nearer to one another than to others, up to all.

    Of two domains, one contains the other or they have no node in common. Smaller ones come first.
    """
    nodes = topology.nodes
    own = [speed_of(node.device_link) for node in nodes]
    clusters: list[tuple[int, ...]] = [(index,) for index in range(len(nodes))]
    domains = [LinkDomain(nodes=cluster, speed=own[cluster[0]]) for cluster in clusters]
    between = [
        [speed_of(topology.node_link(a, b)) if i < j else 0 for j, b in enumerate(nodes)] for i, a in enumerate(nodes)
    ]
    speeds = sorted({row[j] for i, row in enumerate(between) for j in range(i + 1, len(nodes))}, reverse=True)
    for speed in speeds:
        merged = _merge(clusters, between, speed)
        domains += [
            LinkDomain(nodes=cluster, speed=min(speed, *(own[index] for index in cluster)))
            for cluster in merged
            if cluster not in clusters
        ]
        clusters = merged
    return tuple(sorted(domains, key=lambda domain: (len(domain.nodes), domain.nodes)))


def _merge(clusters: list[tuple[int, ...]], between: list[list[int]], speed: int) -> list[tuple[int, ...]]:
    """Join clusters whose every two nodes are linked at this speed or above, each to the first that it can."""
    merged: list[tuple[int, ...]] = []
    for cluster in clusters:
        for place, other in enumerate(merged):
            if all(between[min(i, j)][max(i, j)] >= speed for i in cluster for j in other):
                merged[place] = tuple(sorted(other + cluster))
                break
        else:
            merged.append(cluster)
    return merged
