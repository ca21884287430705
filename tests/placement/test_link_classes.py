"""Measured links in classes: noise is taken out, what differs stays apart, large clusters are planned as quickly."""

from __future__ import annotations

import random
from itertools import combinations
from time import process_time

import pytest

from slipstream.placement.link_classes import in_classes
from slipstream.placement.link_domains import link_domains
from slipstream.placement.plan_search import search
from slipstream.placement.topology import Link, Topology
from slipstream.tests.placement.planning_cases import cluster, llama_3_70b, node
from slipstream.tests.placement.test_plan_search import question

SLOW, FAST = 3e9, 6e9
NOISE = 0.08


def measured(names: list[str], draw: random.Random, *, rack: int) -> dict[tuple[str, str], Link]:
    """Return links that are twice as fast within racks, each with its own noise."""
    racks = {name: index // rack for index, name in enumerate(names)}
    return {
        (a, b): Link(
            bytes_per_s=(FAST if racks[a] == racks[b] else SLOW) * draw.uniform(1 - NOISE, 1 + NOISE),
            latency_s=20e-6 * draw.uniform(0.7, 1.5),
        )
        for a, b in combinations(names, 2)
    }


def names_of(count: int) -> list[str]:
    return [f"n{index:03}" for index in range(count)]


def test_noise_is_taken_out_and_kinds_of_links_stay_apart(seed: int) -> None:
    names = names_of(12)
    links = in_classes(measured(names, random.Random(seed), rack=4))
    slow, fast = sorted(set(links.values()), key=lambda link: link.bytes_per_s)
    assert slow.bytes_per_s == pytest.approx(SLOW, rel=NOISE) and fast.bytes_per_s == pytest.approx(FAST, rel=NOISE)
    assert links["n000", "n003"] == fast and links["n000", "n004"] == slow
    topology = cluster(*(node(name) for name in names))
    found = link_domains(Topology(nodes=topology.nodes, device_types=topology.device_types, network=slow, links=links))
    assert [domain.nodes for domain in found if len(domain.nodes) > 1] == [
        (0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), tuple(range(12)),
    ]  # fmt: skip


def test_a_single_slow_link_is_a_class_of_its_own() -> None:
    links = {("a", "b"): Link(bytes_per_s=1e9, latency_s=1e-5), ("a", "c"): Link(bytes_per_s=1e7, latency_s=2e-3)}
    assert in_classes(links) == links
    assert in_classes({}) == {}


def test_a_chain_of_small_steps_is_cut_so_that_no_link_is_taken_for_twice_another() -> None:
    links = {("a", f"b{step}"): Link(bytes_per_s=1e9 * 1.05**step, latency_s=1e-5) for step in range(60)}
    found = in_classes(links)
    for pair, link in found.items():
        assert 0.5 <= link.bytes_per_s / links[pair].bytes_per_s <= 2.0
    assert 5 <= len(set(found.values())) <= 16


def test_a_large_cluster_with_measured_links_is_planned_in_seconds(seed: int) -> None:
    nodes = [node(name) for name in names_of(128)]
    start = process_time()
    links = in_classes(measured([each.name for each in nodes], random.Random(seed), rack=8))
    plain = cluster(*nodes)
    topology = Topology(nodes=plain.nodes, device_types=plain.device_types, network=plain.network, links=links)
    ranking = search(question(topology, llama_3_70b()))
    took_s = process_time() - start
    assert ranking.plans[0].figures.devices == 1024
    assert took_s < 30, f"{took_s:.1f} s"
