"""From what a platform lists to a topology."""

from __future__ import annotations

from dataclasses import replace

from slipstream.placement.topology import DeviceType, Link
from slipstream.runtime.controller.node_facts import NodeFacts, topology_of

LINK = Link(bytes_per_s=1e9, latency_s=1e-4)
TYPES = {"h100": DeviceType(name="h100", memory_bytes=80 << 30, flops={}, memory_bytes_per_s=3e12)}


def node(number: str, resources: dict[str, float], **labels: str) -> NodeFacts:
    named = {name.replace("_", ".", 1).replace("_", "-"): value for name, value in labels.items()}
    return NodeFacts(number=number, address="10.0.0.1", resources=resources, labels=named)


def topology(*nodes: NodeFacts):
    return topology_of(nodes, TYPES, network=LINK, device_link=LINK)


def test_devices_are_named_by_the_node_or_are_its_gpus_or_itself() -> None:
    named = node("f" * 56, {"slipstream_device_0": 1, "slipstream_device_1": 1, "GPU": 8}, slipstream_node="named")
    gpus = node("e" * 56, {"GPU": 4, "CPU": 9}, slipstream_node="gpus", slipstream_device_type="h100")
    bare = node("d" * 56, {"CPU": 9})
    found = {each.name: (each.devices, each.device_type) for each in topology(named, gpus, bare).nodes}
    assert found == {"named": (2, "gpu"), "gpus": (4, "h100"), "dddddddddddd": (1, "cpu")}
    assert named.claim(1) == {"slipstream_device_1": 1.0}
    assert gpus.claim(3) == {"GPU": 1.0} and gpus.environment(3) == {"CUDA_VISIBLE_DEVICES": "3"}
    assert bare.claim(0) == {} and bare.environment(0) == {}


def test_of_two_nodes_with_one_name_none_is_used() -> None:
    first, second = node("a" * 56, {}, slipstream_node="x"), node("b" * 56, {}, slipstream_node="x")
    assert [each.name for each in topology(first, second, node("c" * 56, {}, slipstream_node="y")).nodes] == ["y"]


def test_a_type_that_nobody_knows_can_be_used() -> None:
    (device,) = topology(node("a" * 56, {}, slipstream_device_type="odd")).devices()
    assert topology(node("a" * 56, {}, slipstream_device_type="odd")).device_type(device).memory_bytes == 0


def test_what_somebody_has_is_taken_as_far_as_was_asked() -> None:
    named = node("f" * 56, {"slipstream_device_0": 1, "slipstream_device_1": 1}, slipstream_node="named")
    gpus = node("e" * 56, {"GPU": 4}, slipstream_node="gpus", slipstream_device_type="h100")
    bare = node("d" * 56, {"CPU": 9})
    assert not any(each.taken for each in (named, gpus, bare))
    asked = [
        replace(named, available={"slipstream_device_1": 1.0}),
        replace(gpus, available={"GPU": 3.0}),
        replace(bare, available={"CPU": 1.0}),
    ]
    free = [str(device) for device in topology(*asked).devices()]
    assert free == ["dddddddddddd/0", "gpus/0", "gpus/1", "gpus/2", "named/1"]


def test_measured_links_stand_in_for_the_network_and_the_table_for_links_in_a_node() -> None:
    measured = Link(bytes_per_s=7e9, latency_s=2e-5)
    nodes = [node(letter * 56, {}, slipstream_node=letter, slipstream_device_type="h100") for letter in "abc"]
    found = topology_of(nodes, TYPES, network=LINK, links={("a", "b"): measured})
    assert found.node_link(found.node("b"), found.node("a")) == measured
    assert found.node_link(found.node("a"), found.node("c")) == LINK
    assert found.node("a").device_link == TYPES["h100"].link
