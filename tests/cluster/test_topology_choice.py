"""On what a cluster file is planned, what is said of it, and topologies written down and read again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from slipstream.placement.device_table import DEVICE_TABLE
from slipstream.placement.topology import DeviceType, Link, Node, Topology
from slipstream.runtime.cluster.plan_command import plan_command
from slipstream.runtime.cluster.topology_choice import ChosenTopology
from slipstream.runtime.cluster.topology_sections import read_topology
from slipstream.runtime.cluster.topology_text import topology_text, unknown_types
from slipstream.sdk.errors import ConfigError, EngineUnavailable

CONFIGS = Path(__file__).resolve().parents[2] / "cluster_configs"
NETWORK = Link(bytes_per_s=2e9, latency_s=50e-6)


def node(name: str, kind: str = "cpu-core", **more) -> Node:
    link = DEVICE_TABLE[kind].link if kind in DEVICE_TABLE else NETWORK
    return Node(name=name, address=f"{name}.test", device_type=kind, devices=2, device_link=link, **more)


def topology(*nodes: Node, links: Mapping[tuple[str, str], Link] | None = None, types=DEVICE_TABLE) -> Topology:
    return Topology(nodes=nodes, device_types=types, network=NETWORK, links=links or {})


class Running:
    """A cluster that runs, or one that does not."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[str | None] = []
        self._error = error

    def __call__(self, address: str | None, types: Mapping[str, DeviceType]) -> ChosenTopology:
        self.asked.append(address)
        assert "cpu-core" in types
        if self._error is not None:
            raise self._error
        return ChosenTopology(topology=topology(node("seen-0"), node("seen-1")), said=("a running Ray",))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A cluster file without a topology file beside it."""
    text = (CONFIGS / "laptop.yaml").read_text(encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("../examples", str(CONFIGS.parent / "examples")), encoding="utf-8")
    return path


def test_without_any_file_the_cluster_that_runs_is_planned_on(file: Path) -> None:
    running = Running()
    text, found = plan_command(file, topology=None, running=running)
    assert found and text.startswith("a running Ray\n\n") and "seen-0[" in text
    assert running.asked == [None]


def test_a_file_beside_goes_before_the_cluster_that_runs_unless_that_is_asked_for(file: Path) -> None:
    beside = file.with_name("mine.topology.yaml")
    beside.write_text((CONFIGS / "laptop.topology.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    running = Running()
    text, _ = plan_command(file, topology=None, running=running)
    assert text.startswith(f"topology: {beside}, beside the cluster file; --address auto plans on the Ray that runs")
    assert not running.asked and "laptop[" in text
    answer = json.loads(plan_command(file, topology=None, address="auto", running=running, as_json=True)[0])
    assert running.asked == ["auto"] and answer["topology"] == ["a running Ray"]


def test_a_file_that_is_named_is_all_that_counts(file: Path) -> None:
    running = Running()
    named = CONFIGS / "laptop.topology.yaml"
    assert plan_command(file, topology=named, running=running)[0].startswith(f"topology: {named}\n")
    with pytest.raises(ConfigError, match="address: goes without --topology"):
        plan_command(file, topology=named, address="auto", running=running)
    assert not running.asked


@pytest.mark.parametrize("error", [EngineUnavailable("no Ray can be reached"), ImportError("No module named 'ray'")])
def test_without_file_and_cluster_all_ways_out_are_said(file: Path, error: Exception) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_command(file, topology=None, running=Running(error))
    message = str(caught.value)
    assert message.startswith("topology: give --topology FILE, or put mine.topology.yaml beside ")
    assert message.endswith(f", or start Ray: {error}")
    # Who names an address wants to know what is wrong with that.
    with pytest.raises(type(error), match=str(error)):
        plan_command(file, topology=None, address="10.0.0.1:6379", running=Running(error))


def test_a_topology_that_is_written_down_is_read_again(tmp_path: Path) -> None:
    fast, slow = Link(bytes_per_s=6.123e9, latency_s=30e-6), Link(bytes_per_s=1.5e6, latency_s=2.5e-3)
    wide = Link(bytes_per_s=3e9, latency_s=1e-6)
    made = topology(
        node("a", labels={"rack": "one: #2", "ray.io/node-id": "f00"}),
        node("b", taken=frozenset({1})),
        Node(name="c", address="c", device_type="h100-sxm", devices=8, device_link=wide),
        node("d"),
        links={("a", "b"): slow, ("a", "c"): fast, ("a", "d"): fast, ("b", "c"): fast, ("b", "d"): fast},
    )
    path = tmp_path / "saved.yaml"
    path.write_text(topology_text(made, ["measured"]), encoding="utf-8")
    assert path.read_text().startswith("# measured\nnodes:\n") and path.read_text().count("between") == 2
    read = read_topology(path)
    by_name = {each.name: each for each in read.nodes}
    assert by_name["a"].labels == {"rack": "one: #2"} and by_name["b"].taken == {1}
    assert by_name["c"].device_link == wide and by_name["d"].device_link == DEVICE_TABLE["cpu-core"].link
    for a, b in (("a", "b"), ("a", "c"), ("a", "d"), ("b", "c"), ("b", "d"), ("c", "d")):
        wanted = made.node_link(made.node(a), made.node(b))
        found = read.node_link(by_name[a], by_name[b])
        assert found.bytes_per_s == pytest.approx(wanted.bytes_per_s, rel=1e-3)
        assert found.latency_s == pytest.approx(wanted.latency_s, rel=1e-3)


def test_types_that_nobody_knows_are_named_before_they_are_planned_on(tmp_path: Path) -> None:
    odd = DeviceType(name="odd", memory_bytes=0, flops={}, memory_bytes_per_s=0.0)
    made = topology(node("a", "odd"), types={**DEVICE_TABLE, "odd": odd})
    assert unknown_types(made) == ["odd"]
    path = tmp_path / "saved.yaml"
    path.write_text(topology_text(made), encoding="utf-8")
    with pytest.raises(ConfigError, match="'odd' is unknown"):
        read_topology(path)
