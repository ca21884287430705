"""All pairs of nodes: who is measured when, what is kept, and what planning gets of it."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest

from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.controller.cluster import ClusterError
from slipstream.runtime.controller.known_links import KnownLinks
from slipstream.runtime.controller.ledger import EVERYWHERE, Ledger
from slipstream.runtime.controller.link_actor import LinkActor, LinkAnswer
from slipstream.runtime.controller.link_rounds import rounds_of
from slipstream.runtime.controller.link_wire import ProbeError, ProbeLimits, ProbeTimeout
from slipstream.runtime.controller.links import LinkFigures, MeasuredLink, MeasuredLinks
from slipstream.runtime.controller.measure_links import measure_links
from slipstream.runtime.controller.node_facts import NodeFacts
from slipstream.runtime.controller.records import from_json, to_json
from slipstream.tests.fakes.memory_store import MemoryStore


def figures(gbytes_per_s: float = 1.0, round_trip_us: float = 100.0) -> LinkFigures:
    return LinkFigures(
        bytes_per_s=gbytes_per_s * 1e9, round_trip_s=round_trip_us * 1e-6, round_trip_p99_s=round_trip_us * 2e-6
    )


def measured(**rates: float) -> MeasuredLinks:
    """Return a measurement from names such as a_b."""
    links = tuple(MeasuredLink(source=pair[0], target=pair[-1], figures=figures(rate)) for pair, rate in rates.items())
    names = sorted({name for link in links for name in (link.source, link.target)})
    return MeasuredLinks(began_s=1e9, took_s=3.0, addresses={name: f"{name}.test" for name in names}, links=links)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 33, 128])
def test_everybody_meets_everybody_once_and_nobody_is_in_two_pairs_at_once(count: int) -> None:
    names = [f"n{index}" for index in range(count)]
    rounds = rounds_of(names)
    met = Counter(frozenset(pair) for pairs in rounds for pair in pairs)
    assert met == Counter(frozenset(pair) for pair in combinations(names, 2))
    for pairs in rounds:
        there = [name for pair in pairs for name in pair]
        assert len(there) == len(set(there))
    assert len(rounds) == (0 if count < 2 else count - 1 + count % 2)


class _Ends:
    """Ends of links of which some fail; sees to it that no node is in two measurements at once."""

    def __init__(self, *, broken: str = "") -> None:
        self._broken = broken
        self._lock = threading.Lock()
        self._busy: set[str] = set()
        self._tokens: dict[str, str] = {}
        self.now_s = 0.0

    def listen(self, node: str, token: str, *, timeout_s: float) -> str:
        assert timeout_s > 0
        with self._lock:
            assert token not in self._tokens
            self._tokens[token] = node
        return f"{node}:1"

    def measure(self, node: str, where: str, token: str, *, timeout_s: float) -> LinkFigures:
        source = where.partition(":")[0]
        with self._lock:
            assert self._tokens[token] == source and not self._busy & {node, source}
            self._busy |= {node, source}
        try:
            if node == self._broken:
                raise ProbeTimeout("it does not answer") if source < node else ClusterError("its actor is gone")
            return figures(ord(source) / 100)
        finally:
            with self._lock:
                self._busy -= {node, source}
                self.now_s += 1.0


def test_both_directions_of_every_link_are_measured_and_one_that_fails_harms_no_other() -> None:
    addresses = {name: f"{name}.test" for name in "abcde"}
    told: list[str] = []
    ends = _Ends(broken="c")
    found = measure_links(ends, addresses, timeout_s=1e3, clock=lambda: ends.now_s, wall=lambda: 5.0, tell=told.append)
    pairs = {(each.source, each.target) for each in found.links}
    assert pairs == {(a, b) for a in addresses for b in addresses if a != b and b != "c"}
    assert {each.why for each in found.missing} == {"it does not answer", "its actor is gone"}
    assert {each.target for each in found.missing} == {"c"} and len(found.missing) == 4
    assert (found.began_s, found.addresses) == (5.0, addresses)
    assert len(told) == 5 and told[0].startswith("round 1 of 5: ")


def test_what_is_left_when_the_time_is_over_is_said() -> None:
    ends = _Ends()
    addresses = {name: name for name in "abcd"}
    found = measure_links(ends, addresses, timeout_s=4.0, clock=lambda: ends.now_s, wall=lambda: 5.0)
    assert len(found.links) + len(found.missing) == 12 and len(found.links) >= 4
    assert {each.why for each in found.missing} == {"the 4 s for all were over"}


class _OwnEnds:
    """What actors on nodes would do, in this process, over loopback."""

    def __init__(self, names: str, limits: ProbeLimits) -> None:
        self._actors = {name: LinkActor("127.0.0.1", to_json(limits)) for name in names}

    def listen(self, node: str, token: str, *, timeout_s: float) -> str:
        return from_json(LinkAnswer, self._actors[node].listen(token)).where

    def measure(self, node: str, where: str, token: str, *, timeout_s: float) -> LinkFigures:
        answer = from_json(LinkAnswer, self._actors[node].measure(where, token))
        if answer.figures is None:
            raise ProbeError(answer.problem)
        return answer.figures

    def close(self) -> None:
        for actor in self._actors.values():
            actor.close()


def test_actors_measure_one_another() -> None:
    ends = _OwnEnds("abc", ProbeLimits(streams=2, seconds=0.1, exchanges=20, timeout_s=8.0))
    try:
        addresses = dict.fromkeys("abc", "127.0.0.1")
        found = measure_links(ends, addresses, timeout_s=60.0, clock=monotonic_clock, wall=lambda: 5.0)
        assert len(found.links) == 6 and not found.missing
        assert found.moved_bytes == sum(each.figures.moved_bytes for each in found.links) > 0
        nobody = from_json(LinkAnswer, LinkActor("203.0.113.1", to_json(ProbeLimits())).listen("t" * 32))
        assert "cannot listen" in nobody.problem
    finally:
        ends.close()


# ------------------------------------------------------------------ kept, and used


def test_a_pair_has_its_slower_direction_and_only_where_its_nodes_were() -> None:
    found = measured(a_b=2.0, b_a=1.0, a_c=4.0, c_a=4.0)
    there = {name: f"{name}.test" for name in "abc"}
    links = found.pairs(there)
    assert links == {("a", "b"): figures(1.0).link, ("a", "c"): figures(4.0).link}
    # Half of a round trip is what one message takes.
    assert links["a", "b"].latency_s == pytest.approx(50e-6)
    assert found.pairs({**there, "c": "elsewhere"}) == {("a", "b"): figures(1.0).link}
    assert found.pairs({"a": "a.test"}) == {}


def test_a_measurement_is_kept_for_the_cluster_and_outlives_deployments() -> None:
    store = MemoryStore()
    everywhere, deployment = Ledger(store, deployment=EVERYWHERE), Ledger(store, deployment="d")
    assert everywhere.links() is None and everywhere.links_number() == 0
    for rate in (1.0, 2.0):
        assert everywhere.keep_links(measured(a_b=rate))
    assert everywhere.links() == measured(a_b=2.0) and everywhere.links_number() == 2
    deployment.forget()
    assert everywhere.links() == measured(a_b=2.0) and len(store.values) == 1


class _CountingStore(MemoryStore):
    reads = 0

    def get(self, key: str) -> str | None:
        self.reads += 1
        return super().get(key)


def node(name: str, address: str) -> NodeFacts:
    return NodeFacts(number="f00", address=address, resources={}, labels={"slipstream.node": name})


def test_who_looks_often_reads_once() -> None:
    store = _CountingStore()
    ledger = Ledger(store, deployment=EVERYWHERE)
    known = KnownLinks(ledger)
    nodes = [node("a", "a.test"), node("b", "b.test")]
    assert known.between(nodes) == {} and known.measured is None
    ledger.keep_links(measured(a_b=1.0))
    for _ in range(5):
        assert known.between(nodes) == {("a", "b"): figures(1.0).link}
    assert store.reads == 1
    # A node that has come back at another address is another machine.
    assert known.between([nodes[0], replace(nodes[1], address="b2.test")]) == {}
    ledger.keep_links(measured(a_b=3.0))
    assert known.between(nodes) == {("a", "b"): figures(3.0).link}
    assert store.reads == 2
