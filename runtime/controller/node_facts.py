"""From a platform's list of nodes to a topology: which devices a node has, of which type, what its labels say.

Plain values in and out. A node's devices are counted by the resources ``slipstream_device_0``, ``_1`` and so on where
it has them: the platform then sees to it too that each has one owner. Otherwise they are its GPUs, or the node is one
device itself.

    label slipstream.node         the node's name, if it is not to be the platform's number
    label slipstream.device-type  a row of the device table
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...placement.topology import DeviceType, Link, Node, Topology

NAME_LABEL = "slipstream.node"
TYPE_LABEL = "slipstream.device-type"
DEVICE_RESOURCE = "slipstream_device_"
_NUMBER_CHARACTERS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """One node that lives, as the platform lists it. ``number``: the platform's own, new each time that it starts."""

    number: str
    address: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]

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

    def claim(self, index: int) -> dict[str, float]:
        """Return the resources that stand for one of its devices."""
        if self.own_devices:
            return {f"{DEVICE_RESOURCE}{index}": 1.0}
        return {"GPU": 1.0} if self.resources.get("GPU") else {}

    def environment(self, index: int) -> dict[str, str]:
        """Return what lets a process see this device and no other."""
        return {"CUDA_VISIBLE_DEVICES": str(index)} if self.resources.get("GPU") else {}


def topology_of(
    nodes: Iterable[NodeFacts], device_types: Mapping[str, DeviceType], *, network: Link, device_link: Link
) -> Topology:
    """Return the topology of nodes that live. A type that the table lacks is taken as one of which nothing is known."""
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
                devices=node.own_devices or int(node.resources.get("GPU", 0)) or 1,
                device_link=device_link,
                labels=dict(node.labels),
            )
            for node in one_of_each(listed)
        ),
        device_types=known,
        network=network,
    )


def one_of_each(nodes: Iterable[NodeFacts]) -> list[NodeFacts]:
    """Return nodes by their names, none of those of which two have the same: nobody could say which is meant."""
    by_name: dict[str, list[NodeFacts]] = {}
    for node in nodes:
        by_name.setdefault(node.name, []).append(node)
    return [same[0] for same in by_name.values() if len(same) == 1]
