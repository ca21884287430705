"""What a cluster is made of: nodes, their devices, the links between them, and which fail together.

Plain values, as they were read or measured at one moment; whoever decides takes them as arguments. Where they come
from (Ray, a file, a measurement) is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class DeviceRef:
    """One device: the node's name and the device's index there."""

    node: str
    index: int

    def __str__(self) -> str:
        return f"{self.node}/{self.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What one direction between two ends carries.

    Units: bytes_per_s; latency_s, of the smallest message
    """

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceType:
    """A row of the device table: what one device of a kind can do.

    Units: memory_bytes; flops, multiply-adds counted as two, dense, by type of number ("bfloat16", "float32", "int8",
    "float8"); memory_bytes_per_s; power_w at full load; price_per_hour in any one currency
    ``link``: between two devices of this kind in one node, where the node does not say otherwise.
    """

    name: str
    memory_bytes: int
    flops: Mapping[str, float]
    memory_bytes_per_s: float
    power_w: float = 0.0
    price_per_hour: float = 0.0
    link: Link = Link(bytes_per_s=32e9, latency_s=10e-6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One machine. Its devices count from 0 and are all of one type.

    ``labels``: what operators and the platform say of it; among them the domains that fail together, such as ``rack``.
    ``device_link``: between two of its devices; ``taken``: indices of devices that something else uses.
    """

    name: str
    address: str
    device_type: str
    devices: int
    device_link: Link
    labels: Mapping[str, str] = field(default_factory=dict)
    taken: frozenset[int] = frozenset()

    @property
    def free(self) -> tuple[DeviceRef, ...]:
        """The devices that can be used, in order."""
        return tuple(DeviceRef(node=self.name, index=index) for index in range(self.devices) if index not in self.taken)


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """All nodes of a cluster that are there, and the network between them.

    ``network`` holds between any two nodes unless ``links`` has the pair, named in sorted order, or ``within`` has a
    label for which both say the same (an NVLink domain, a rack): its first that holds counts.

    Raises: ValueError naming the node whose name is there twice or whose device type is unknown
    """

    nodes: tuple[Node, ...]
    device_types: Mapping[str, DeviceType]
    network: Link
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    within: Mapping[str, Link] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [node.name for node in self.nodes]
        for node in self.nodes:
            if names.count(node.name) > 1:
                raise ValueError(f"two nodes are called {node.name!r}")
            if node.device_type not in self.device_types:
                known = ", ".join(sorted(self.device_types))
                raise ValueError(f"node {node.name!r} has devices of type {node.device_type!r}; known are {known}")

    def node(self, name: str) -> Node:
        """Return a node by its name. Raises: KeyError"""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def devices(self) -> Iterator[DeviceRef]:
        """Yield all devices that can be used, node by node."""
        for node in self.nodes:
            yield from node.free

    def device_type(self, device: DeviceRef) -> DeviceType:
        """Return what a device can do."""
        return self.device_types[self.node(device.node).device_type]

    def link(self, a: DeviceRef, b: DeviceRef) -> Link:
        """Return the link between two devices: of their node, or of the network between their nodes."""
        first = self.node(a.node)
        return first.device_link if a.node == b.node else self.node_link(first, self.node(b.node))

    def node_link(self, a: Node, b: Node) -> Link:
        """Return the link between two different nodes."""
        measured = self.links.get((a.name, b.name) if a.name < b.name else (b.name, a.name))
        if measured is not None:
            return measured
        for label, link in self.within.items():
            if label in a.labels and a.labels[label] == b.labels.get(label):
                return link
        return self.network
