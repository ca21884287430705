"""What planning can know of a Ray that runs: nodes, their devices, which of them are free, and links as measured.

Also measures the links, with an actor on each node that ends with this process. Owns what is said of all that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...placement.topology import DeviceType, Topology
from ..clock import monotonic_clock, wall_clock
from ..cluster.topology_choice import ChosenTopology
from .cluster import ClusterError
from .known_links import KnownLinks
from .ledger import EVERYWHERE, NETWORK, Ledger
from .link_actor import LinkActor, LinkAnswer
from .link_wire import ProbeError, ProbeLimits
from .links import LinkFigures, MeasuredLinks
from .measure_links import measure_links
from .node_facts import NodeFacts, one_of_each, topology_of
from .ray_cluster import RayStore, answer_of, helper_on, list_nodes
from .records import from_json, to_json

_START_S = 30.0
"""How long an actor may take to come up."""


def running_topology(device_types: Mapping[str, DeviceType]) -> ChosenTopology:
    """Return what runs on the Ray that this process is connected to."""
    listed = list_nodes(with_available=True)
    known = KnownLinks(Ledger(RayStore(), deployment=EVERYWHERE))
    links = known.between(listed)
    nodes = one_of_each(listed)
    topology = topology_of(nodes, device_types, network=NETWORK, links=links)
    said = [_said_of_nodes(topology), *_said_of_links(topology, known.measured)]
    if len(nodes) < len(listed):
        twice = sorted({node.name for node in listed} - {node.name for node in nodes})
        said.append(f"left out, because two nodes have the same name: {', '.join(twice)}")
    if unknown := sorted({node.device_type for node in topology.nodes} - set(device_types)):
        said.append(
            f"the device table has no {', '.join(unknown)}: give nodes the label slipstream.device-type=TYPE, or the "
            "cluster file a row in device_types"
        )
    return ChosenTopology(topology=topology, said=tuple(said))


def measure_running(
    limits: ProbeLimits,
    device_types: Mapping[str, DeviceType],
    *,
    timeout_s: float,
    tell: Callable[[str], None],
) -> tuple[MeasuredLinks, Topology]:
    """Measure all links of the Ray that this process is connected to, and keep the figures.

    Returns: the figures, and the topology with them.
    Raises: ClusterError
    """
    nodes = one_of_each(list_nodes())
    if len(nodes) < 2:
        raise ClusterError(f"links are between nodes, and this Ray has {len(nodes)}")
    addresses = {node.name: node.address for node in nodes}
    measured = measure_links(
        _RayEnds(nodes, limits), addresses, timeout_s=timeout_s, clock=monotonic_clock, wall=wall_clock, tell=tell
    )
    # Nothing at all says more of the moment than of the links.
    if measured.links and not Ledger(RayStore(), deployment=EVERYWHERE).keep_links(measured):
        raise ClusterError("somebody else has measured at the same time: both disturbed the other; try again")
    topology = topology_of(nodes, device_types, network=NETWORK, links=measured.pairs(addresses))
    return measured, topology


class _RayEnds:
    """Ends of links, as actors on the nodes."""

    def __init__(self, nodes: Sequence[NodeFacts], limits: ProbeLimits) -> None:
        self._patience_s = _START_S + limits.timeout_s
        self._actors = {node.name: helper_on(LinkActor, node, node.address, to_json(limits)) for node in nodes}

    def listen(self, node: str, token: str, *, timeout_s: float) -> str:
        return self._answer(self._actors[node].listen.remote(token), timeout_s).where

    def measure(self, node: str, where: str, token: str, *, timeout_s: float) -> LinkFigures:
        figures = self._answer(self._actors[node].measure.remote(where, token), timeout_s).figures
        assert figures is not None, "an answer without a problem has figures"
        return figures

    def _answer(self, call: Any, timeout_s: float) -> LinkAnswer:
        answer = from_json(LinkAnswer, answer_of(call, timeout_s=max(0.0, min(timeout_s, self._patience_s))))
        if answer.problem:
            raise ProbeError(answer.problem)
        return answer


def _said_of_nodes(topology: Topology) -> str:
    nodes = [f"{node.name} ({len(node.free)} of {node.devices} {node.device_type} free)" for node in topology.nodes]
    return f"topology: a running Ray, nodes {', '.join(nodes) or 'none'}"


def _said_of_links(topology: Topology, measured: MeasuredLinks | None) -> list[str]:
    nodes = len(topology.nodes)
    pairs = nodes * (nodes - 1) // 2
    names = {node.name for node in topology.nodes}
    known = sum(1 for a, b in topology.links if a in names and b in names)
    if not pairs:
        return []
    said = []
    if known and measured is not None:
        said.append(f"links: {known} of {pairs} measured {_ago(wall_clock() - measured.began_s)} ago")
    if known < pairs:
        network = topology.network
        said.append(
            f"links: {pairs - known} of {pairs} assumed to have {network.bytes_per_s / 1e9:g} GB/s and "
            f"{network.latency_s * 1e6:g} us; `slipstream measure-links` measures them"
        )
    return said


def _ago(seconds: float) -> str:
    for unit, length_s in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{seconds:.0f} seconds"
