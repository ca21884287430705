"""A topology as a topology file: what was seen of a cluster, to plan on without it.

Owns the way back from ``topology_sections``: every line is YAML in JSON's words, short where nodes and links are alike.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import combinations
from typing import Any

from ...placement.device_table import DEVICE_TABLE
from ...placement.topology import Link, Node, Topology

_OF_ONE_RUN = frozenset({"ray.io/node-id"})
"""Labels that say nothing once the cluster has started again."""


def topology_text(topology: Topology, comments: Iterable[str] = ()) -> str:
    """Return the text of a file from which the same topology is read; types are by name alone."""
    pairs = {
        (a.name, b.name): topology.node_link(a, b)
        for a, b in combinations(sorted(topology.nodes, key=lambda node: node.name), 2)
    }
    # What most pairs have need not be said for each.
    network = Counter(pairs.values()).most_common(1)[0][0] if pairs else topology.network
    lines = [f"# {comment}" for comment in comments]
    lines += ["nodes:", *(f"  - {json.dumps(_node(node))}" for node in topology.nodes)]
    lines.append(f"network: {json.dumps(_link(network))}")
    others = [
        f"  - {json.dumps({'between': list(pair), 'link': _link(link)})}"
        for pair, link in pairs.items()
        if link != network
    ]
    return "\n".join([*lines, *(["links:", *others] if others else [])]) + "\n"


def unknown_types(topology: Topology) -> list[str]:
    """Return the types of devices that the device table lacks: they need a row before anything is planned on them."""
    return sorted({node.device_type for node in topology.nodes} - set(DEVICE_TABLE))


def _node(node: Node) -> dict[str, Any]:
    said: dict[str, Any] = {
        "name": node.name,
        "address": node.address,
        "device_type": node.device_type,
        "devices": node.devices,
    }
    known = DEVICE_TABLE.get(node.device_type)
    if known is not None and node.device_link != known.link:
        said["device_link"] = _link(node.device_link)
    if labels := {name: value for name, value in node.labels.items() if name not in _OF_ONE_RUN}:
        said["labels"] = labels
    if node.taken:
        said["taken"] = sorted(node.taken)
    return said


def _link(link: Link) -> dict[str, float]:
    return {
        "gbytes_per_s": float(f"{link.bytes_per_s / 1e9:.4g}"),
        "latency_us": float(f"{link.latency_s * 1e6:.4g}"),
    }
