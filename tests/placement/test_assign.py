"""Which device each rank gets: links first, then failure domains, and what is missing where nothing fits."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from time import process_time

from hypothesis import given
from hypothesis import strategies as st

from slipstream.placement.assign import Placer, assign
from slipstream.placement.link_domains import speed_of
from slipstream.placement.plan import Constraint, Degrees, ReplicaPlace, Shortage
from slipstream.placement.topology import DeviceRef, Link, Node, Topology
from slipstream.tests.placement.planning_cases import NETWORK, NVLINK, PCIE, RACK, cluster, node

ANY = Constraint()


def placed(topology: Topology, degrees: Degrees, constraint: Constraint = ANY, **rest: object) -> ReplicaPlace:
    found = assign(topology, tuple(topology.devices()), degrees, constraint, **rest)  # type: ignore[arg-type]
    assert isinstance(found, ReplicaPlace), found
    return found


def nodes_of(place: ReplicaPlace) -> list[str]:
    return [device.node for device in place.devices]


def slowest_group(topology: Topology, devices: tuple[DeviceRef, ...], tp: int) -> int:
    """Return the speed of the slowest link inside any tensor-parallel group."""
    groups = [devices[first : first + tp] for first in range(0, len(devices), tp)]
    return min(speed_of(topology.link(a, b)) for group in groups for a, b in combinations(group, 2))


def test_ranks_of_a_group_are_on_one_node_and_groups_in_order() -> None:
    topology = cluster(node("a"), node("b"))
    place = placed(topology, Degrees(tp=4, pp=3))
    assert nodes_of(place) == ["a"] * 8 + ["b"] * 4
    assert [device.index for device in place.devices] == [*range(8), *range(4)]


def test_a_group_takes_the_node_with_fast_links_even_if_it_is_named_last() -> None:
    topology = cluster(node("slow", link=PCIE), node("fast", 4))
    assert nodes_of(placed(topology, Degrees(tp=4))) == ["fast"] * 4
    assert nodes_of(placed(topology, Degrees(tp=8))) == ["slow"] * 8


def test_a_group_too_large_for_a_node_stays_in_a_domain_of_fast_links() -> None:
    domain = Link(bytes_per_s=400e9, latency_s=5e-6)
    topology = cluster(
        node("a", 4, island="x"), node("b", 4, island="y"), node("c", 4, island="x"), node("d", 4, island="y"),
        within={"island": domain},
    )  # fmt: skip
    place = placed(topology, Degrees(tp=8))
    assert set(nodes_of(place)) == {"a", "c"}
    assert nodes_of(placed(topology, Degrees(tp=8, pp=2))) == ["a"] * 4 + ["c"] * 4 + ["b"] * 4 + ["d"] * 4


def test_devices_left_over_are_not_joined_while_a_whole_node_is_free() -> None:
    topology = cluster(node("a", taken=frozenset(range(6))), node("b", taken=frozenset(range(6))), node("c"))
    assert nodes_of(placed(topology, Degrees(tp=4))) == ["c"] * 4


def test_small_replicas_fill_holes_and_leave_whole_nodes_free() -> None:
    topology = cluster(node("a"), node("b", taken=frozenset(range(6))))
    assert nodes_of(placed(topology, Degrees(tp=2))) == ["b"] * 2


def test_experts_ranks_are_close_together() -> None:
    topology = cluster(
        node("a", rack="1"), node("b", rack="2"), node("c", rack="1"), node("d", rack="2"), within={"rack": RACK}
    )
    place = placed(topology, Degrees(ep=16))
    assert set(nodes_of(place)) == {"a", "c"}


def test_replicas_are_spread_over_failure_domains() -> None:
    topology = cluster(*(node(f"n{index}", rack=str(index // 2)) for index in range(6)))
    placer = Placer(topology, tuple(topology.devices()))
    constraint = Constraint(spread="rack")
    others: list[ReplicaPlace] = []
    for _ in range(6):
        place = placer.take(Degrees(tp=4), constraint, others=others)
        assert isinstance(place, ReplicaPlace)
        others.append(place)
    racks = Counter(topology.node(nodes_of(place)[0]).labels["rack"] for place in others)
    assert racks == {"0": 2, "1": 2, "2": 2}


def test_a_replica_does_not_span_racks_when_it_fits_into_one() -> None:
    topology = cluster(*(node(f"n{index}", rack=str(index % 2)) for index in range(4)))
    place = placed(topology, Degrees(tp=8, pp=2), Constraint(spread="rack"))
    assert {topology.node(name).labels["rack"] for name in nodes_of(place)} == {"0"}


def test_fast_links_count_more_than_failure_domains() -> None:
    topology = cluster(node("a", rack="1"), node("b", 8, rack="1"), node("c", 4, link=PCIE, rack="2"))
    first = placed(topology, Degrees(tp=4))
    second = placed(topology, Degrees(tp=4), Constraint(spread="rack"), others=[first])
    assert set(nodes_of(second)) <= {"a", "b"}


def test_constraints_are_kept() -> None:
    topology = cluster(node("a", zone="x"), node("b", kind="a100-80gb", zone="y"), node("c", zone="y"))
    assert set(nodes_of(placed(topology, Degrees(tp=2), Constraint(labels={"zone": "y"})))) <= {"b", "c"}
    assert nodes_of(placed(topology, Degrees(tp=2), Constraint(device_types=frozenset({"a100-80gb"})))) == ["b"] * 2
    assert nodes_of(placed(topology, Degrees(tp=2), Constraint(nodes=frozenset({"c"})))) == ["c"] * 2


def test_a_replica_has_devices_of_one_type() -> None:
    topology = cluster(node("a", 4), node("b", 4, kind="a100-80gb"))
    found = assign(topology, tuple(topology.devices()), Degrees(tp=8), ANY, pool="decode")
    assert isinstance(found, Shortage)
    assert (found.pool, found.needed, found.found) == ("decode", 8, 4)


def test_a_shortage_says_what_is_missing_where() -> None:
    topology = cluster(node("a", taken=frozenset(range(5))), node("b", 2), node("c", zone="y"))
    constraint = Constraint(labels={"zone": "x"})
    found = assign(topology, tuple(topology.devices()), Degrees(tp=8), constraint, pool="p")
    assert isinstance(found, Shortage) and "label zone=x" in found.why
    found = assign(topology, tuple(topology.devices()), Degrees(tp=16), ANY, pool="p")
    assert isinstance(found, Shortage)
    assert found.found == 13 and "3 on a, 2 on b, 8 on c" in found.why and "tp=16" in found.why


def test_only_free_devices_are_used_and_none_twice() -> None:
    topology = cluster(node("a"), node("b"))
    free = tuple(device for device in topology.devices() if device.index % 2)
    placer = Placer(topology, free)
    taken: list[DeviceRef] = []
    while isinstance(place := placer.take(Degrees(tp=2), ANY), ReplicaPlace):
        taken += place.devices
    assert sorted(taken) == sorted(free) and placer.free == ()


SPEEDS = st.sampled_from([NVLINK, PCIE])


@st.composite
def small_cluster(draw: st.DrawFn) -> Topology:
    nodes: list[Node] = []
    for index in range(draw(st.integers(1, 4))):
        rack = str(draw(st.integers(0, 1)))
        nodes.append(node(f"n{index}", draw(st.integers(1, 3)), link=draw(SPEEDS), rack=rack))
    return cluster(*nodes, network=NETWORK, within={"rack": RACK})


@given(small_cluster(), st.integers(2, 3), st.integers(1, 2))
def test_no_other_choice_has_faster_groups(topology: Topology, tp: int, groups: int) -> None:
    """The slowest link inside any group, against every choice of groups there is."""
    devices = tuple(topology.devices())
    found = assign(topology, devices, Degrees(tp=tp, pp=groups), ANY)
    if len(devices) < tp * groups:
        assert isinstance(found, Shortage)
        return
    assert isinstance(found, ReplicaPlace)
    best = max(
        slowest_group(topology, first + second, tp)
        for first in combinations(devices, tp)
        for second in (combinations([d for d in devices if d not in first], tp) if groups == 2 else [()])
    )
    assert slowest_group(topology, found.devices, tp) == best


@given(small_cluster(), st.randoms(use_true_random=False))
def test_the_order_in_which_free_devices_come_changes_nothing(topology: Topology, random: object) -> None:
    devices = list(topology.devices())
    first = assign(topology, devices, Degrees(tp=2), ANY)
    random.shuffle(devices)  # type: ignore[attr-defined]
    assert assign(topology, devices, Degrees(tp=2), ANY) == first


def test_a_large_cluster_is_filled_in_seconds() -> None:
    topology = cluster(*(node(f"n{index:03}", rack=str(index // 8)) for index in range(128)), within={"rack": RACK})
    start = process_time()
    placer = Placer(topology, tuple(topology.devices()))
    others: list[ReplicaPlace] = []
    while isinstance(place := placer.take(Degrees(tp=8), Constraint(spread="rack"), others=others), ReplicaPlace):
        others.append(place)
    took_s = process_time() - start
    assert len(others) == 128 and all(len(set(nodes_of(place))) == 1 for place in others)
    assert took_s < 20, f"{took_s:.1f} s"
