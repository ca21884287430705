"""From a platform's list of nodes to a topology: which devices a node has, of which type, what its labels say.

Plain values in and out. A node's devices are counted by the resources ``slipstream_device_0``, ``_1`` and so on where
it has them: the platform then sees to it too that each has one owner. Otherwise they are its GPUs, or the node is one
device itself.

Where links between nodes were measured, those figures stand in for the network's.

    label slipstream.node         the node's name, if it is not to be the platform's number
    label slipstream.device-type  a row of the device table
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...placement.link_classes import Pair
from ...placement.topology import DeviceType, Link, Node, Topology

NAME_LABEL = "slipstream.node"
TYPE_LABEL = "slipstream.device-type"
DEVICE_RESOURCE = "slipstream_device_"
_NUMBER_CHARACTERS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """One node that lives, as the platform lists it.

    ``number``: the platform's own, new each time that it starts. ``available``: of its resources, what nobody has at
    the moment; None if that was not asked.
    """

    number: str
    address: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    available: Mapping[str, float] | None = None

    @property
    def name(self) -> str:
        """What the node is called in plans."""
        return self.labels.get(NAME_LABEL) or self.number[:_NUMBER_CHARACTERS]

    @property
    def device_type(self) -> str:
        """Its row in the device table."""
        named = self.labels.get(TYPE_LABEL) or self.labels.get("ray.io/accelerator-type")
        return named or ("gpu" if self.resources.get("GPU") else "cpu")

    @property
    def own_devices(self) -> int:
        """How many devices it names itself, 0 if it does not."""
        count = 0
        while f"{DEVICE_RESOURCE}{count}" in self.resources:
            count += 1
        return count

    @property
    def devices(self) -> int:
        """How many devices it has."""
        return self.own_devices or int(self.resources.get("GPU", 0)) or 1

    @property
    def taken(self) -> frozenset[int]:
        """Devices that somebody has, as far as was asked. GPUs are only counted: the last ones stand for those."""
        if self.available is None:
            return frozenset()
        if self.own_devices:
            names = {index: f"{DEVICE_RESOURCE}{index}" for index in range(self.own_devices)}
            return frozenset(index for index, name in names.items() if self.available.get(name, 0.0) < 1.0)
        free = int(self.available.get("GPU", 0)) if self.resources.get("GPU") else self.devices
        return frozenset(range(free, self.devices))

    def claim(self, index: int) -> dict[str, float]:
        """Return the resources that stand for one of its devices."""
        if self.own_devices:
            return {f"{DEVICE_RESOURCE}{index}": 1.0}
        return {"GPU": 1.0} if self.resources.get("GPU") else {}

    def environment(self, index: int) -> dict[str, str]:
        """Return what lets a process see this device and no other."""
        return {"CUDA_VISIBLE_DEVICES": str(index)} if self.resources.get("GPU") else {}


def topology_of(
    nodes: Iterable[NodeFacts],
    device_types: Mapping[str, DeviceType],
    *,
    network: Link,
    device_link: Link | None = None,
    links: Mapping[Pair, Link] | None = None,
) -> Topology:
    """Return the topology of nodes that live. A type that the table lacks is taken as one of which nothing is known.

    ``device_link``: between devices of a node; the device table's where it is None. ``links``: between pairs of nodes,
    named in sorted order; ``network`` holds between the others.
    """
    listed = sorted(nodes, key=lambda node: (node.name, node.number))
    known = dict(device_types)
    for node in listed:
        known.setdefault(
            node.device_type, DeviceType(name=node.device_type, memory_bytes=0, flops={}, memory_bytes_per_s=0.0)
        )
    return Topology(
        nodes=tuple(
            Node(
                name=node.name,
                address=node.address,
                device_type=node.device_type,
                devices=node.devices,
                device_link=device_link or known[node.device_type].link,
                labels=dict(node.labels),
                taken=node.taken,
            )
            for node in one_of_each(listed)
        ),
        device_types=known,
        network=network,
        links=dict(links or {}),
    )


def one_of_each(nodes: Iterable[NodeFacts]) -> list[NodeFacts]:
    """Return nodes by their names, none of those of which two have the same: nobody could say which is meant."""
    by_name: dict[str, list[NodeFacts]] = {}
    for node in nodes:
        by_name.setdefault(node.name, []).append(node)
    return [same[0] for same in by_name.values() if len(same) == 1]
