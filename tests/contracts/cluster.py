"""The contract of ``Cluster``, as tests: an implementation's test module subclasses this and brings a bed.

A bed has three nodes of two devices, two of them at hand from the beginning: ``a`` and ``b``. Nothing here sleeps:
``Bed.wait`` looks again until what is waited for is there, and gives up in the end.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

import pytest

from slipstream.placement.plan import Degrees, Role
from slipstream.placement.topology import DeviceRef
from slipstream.runtime.controller.cluster import Cluster, ClusterError, StaleController, StartRefused
from slipstream.runtime.reconcile.actions import StartGang, StopRank, Unroute
from slipstream.runtime.reconcile.desired import Generation
from slipstream.runtime.reconcile.observed import DriverSeen, Observed, RankSeen, RankState, ReplicaId, ReplicaSpec
from slipstream.runtime.reconcile.views import View

WELL, FAILS = "well", "fails"
"""Pools of a bed: ranks of one come up, those of the other end at once."""


class Bed(Protocol):
    """A platform to try out."""

    cluster: Cluster

    def again(self) -> Cluster:
        """Return the platform as a controller that starts again sees it."""
        ...

    def wait(self, check: Callable[[Observed], bool]) -> Observed:
        """Look until it is as it should be. Raises: AssertionError when it does not become so"""
        ...

    def kill_rank(self, replica: ReplicaId, rank: int) -> None:
        """End a rank's process from outside."""
        ...

    def add_node(self) -> str:
        """Let a third node join."""
        ...

    def lose_node(self, name: str) -> None:
        """End a node with all on it."""
        ...


def gang(incarnation: int, *devices: str, pool: str = WELL) -> StartGang:
    """Return the start of a replica on devices such as a/0."""
    words = [device.partition("/") for device in devices]
    spec = ReplicaSpec(
        id=ReplicaId(pool=pool, incarnation=incarnation),
        role=Role.MIXED,
        generation=Generation(model=3, cut=4),
        degrees=Degrees(tp=len(devices)),
    )
    return StartGang(spec=spec, devices=tuple(DeviceRef(node=node, index=int(index)) for node, _, index in words))


def of(observed: Observed, start: StartGang) -> dict[int, RankSeen]:
    """Return a replica's ranks as they are seen."""
    return {rank.rank: rank for rank in observed.ranks if rank.spec.id == start.spec.id}


def driver(observed: Observed, start: StartGang) -> DriverSeen | None:
    """Return a replica's driver."""
    return next((driver for driver in observed.drivers if driver.replica == start.spec.id), None)


def ready(start: StartGang) -> Callable[[Observed], bool]:
    """Whether all of a replica is ready, proven by a token."""

    def check(observed: Observed) -> bool:
        ranks, seen = of(observed, start), driver(observed, start)
        all_ready = len(ranks) == len(start.devices) and all(r.state is RankState.READY for r in ranks.values())
        return all_ready and seen is not None and seen.proven

    return check


def gone(start: StartGang) -> Callable[[Observed], bool]:
    """Whether nothing of a replica is left."""
    return lambda observed: not of(observed, start)


class ClusterContract(ABC):
    """What holds on every platform."""

    @pytest.fixture
    @abstractmethod
    def bed(self) -> Iterator[Bed]:
        """A platform on which nothing of the deployment runs."""

    @pytest.fixture
    def numbers(self, bed: Bed) -> Iterator[int]:
        """Incarnations that nobody has claimed."""
        return itertools.count(bed.cluster.observe().incarnation + 1)

    def stop(self, bed: Bed, start: StartGang) -> None:
        for rank in range(len(start.devices)):
            bed.cluster.stop(StopRank(replica=start.spec.id, rank=rank, why="the test is over"))
        bed.wait(gone(start))

    def test_a_gang_comes_up_on_its_devices_and_goes(self, bed: Bed, numbers: Iterator[int]) -> None:
        nodes = {node.name: node for node in bed.cluster.observe().topology.nodes}
        assert {"a", "b"} <= set(nodes) and nodes["a"].devices == 2 and nodes["a"].address
        start = gang(next(numbers), "b/1", "a/0")
        bed.cluster.start(start)
        ranks = of(bed.cluster.observe(), start)
        assert [ranks[0].device, ranks[1].device] == list(start.devices)
        assert all(rank.spec == start.spec for rank in ranks.values())
        seen = driver(bed.wait(ready(start)), start)
        assert seen is not None and seen.admitting and seen.address.rpartition(":")[2].isdecimal()
        self.stop(bed, start)
        self.stop(bed, start)
        assert driver(bed.cluster.observe(), start) is None
        # Its devices are free again.
        second = gang(next(numbers), "b/1", "a/0")
        bed.cluster.start(second)
        bed.wait(ready(second))
        self.stop(bed, second)

    def test_an_incarnation_is_claimed_once(self, bed: Bed, numbers: Iterator[int]) -> None:
        start = gang(next(numbers), "a/0")
        bed.cluster.start(start)
        for used in (start, replace(start, devices=(DeviceRef(node="b", index=0),)), gang(1, "b/0")):
            for cluster in (bed.cluster, bed.again()):
                with pytest.raises(StaleController):
                    cluster.start(used)
        observed = bed.cluster.observe()
        assert observed.incarnation == start.spec.id.incarnation
        assert [rank.device for rank in observed.ranks] == list(start.devices)
        self.stop(bed, start)
        assert bed.again().observe().incarnation == start.spec.id.incarnation
        with pytest.raises(StaleController):
            bed.cluster.start(start)

    def test_all_ranks_are_started_or_none(self, bed: Bed, numbers: Iterator[int]) -> None:
        start = gang(next(numbers), "a/0", "nowhere/0")
        with pytest.raises(StartRefused):
            bed.cluster.start(start)
        bed.wait(gone(start))

    def test_a_rank_that_ends_is_seen_and_the_others_are_left_alone(self, bed: Bed, numbers: Iterator[int]) -> None:
        start = gang(next(numbers), "a/0", "b/0")
        bed.cluster.start(start)
        bed.wait(ready(start))
        bed.kill_rank(start.spec.id, 1)

        def failed(observed: Observed) -> bool:
            ranks = of(observed, start)
            return 1 not in ranks or ranks[1].state is RankState.FAILED

        assert of(bed.wait(failed), start)[0].state is RankState.READY
        self.stop(bed, start)

    def test_a_rank_that_does_not_come_up_says_why(self, bed: Bed, numbers: Iterator[int]) -> None:
        start = gang(next(numbers), "a/0", pool=FAILS)
        bed.cluster.start(start)
        observed = bed.wait(lambda seen: of(seen, start)[0].state is RankState.FAILED)
        assert "the checkpoint is cut short" in of(observed, start)[0].detail
        self.stop(bed, start)

    def test_a_controller_that_starts_again_finds_what_runs(self, bed: Bed, numbers: Iterator[int]) -> None:
        start = gang(next(numbers), "a/0", "b/0")
        bed.cluster.start(start)
        before = bed.wait(ready(start))
        bed.cluster = bed.again()
        after = bed.wait(ready(start))
        assert driver(after, start) == driver(before, start)
        assert of(after, start) == of(before, start) and after.incarnation == before.incarnation
        self.stop(bed, start)

    def test_a_driver_takes_no_more_requests_for_good(self, bed: Bed, numbers: Iterator[int]) -> None:
        start = gang(next(numbers), "a/0")
        with pytest.raises(ClusterError):
            bed.cluster.unroute(Unroute(replica=start.spec.id, why="it is not there"))
        bed.cluster.start(start)
        bed.wait(ready(start))

        def refuses(observed: Observed) -> bool:
            bed.cluster.unroute(Unroute(replica=start.spec.id, why="twice does no harm"))
            seen = driver(observed, start)
            return seen is not None and not seen.admitting and seen.idle

        bed.wait(refuses)
        self.stop(bed, start)

    def test_views_are_numbered_upwards_and_kept(self, bed: Bed) -> None:
        last = bed.cluster.observe().view.epoch
        view = View(epoch=last + 2, begun=True)
        bed.cluster.publish(view)
        for epoch in (last, last + 1, last + 2):
            for cluster in (bed.cluster, bed.again()):
                with pytest.raises(StaleController):
                    cluster.publish(View(epoch=epoch))
        assert bed.cluster.observe().view == view == bed.again().observe().view

    def test_a_node_that_comes_late_is_seen_and_one_that_goes_takes_its_ranks_along(
        self, bed: Bed, numbers: Iterator[int]
    ) -> None:
        late = bed.add_node()
        bed.wait(lambda seen: late in {node.name for node in seen.topology.nodes})
        start = gang(next(numbers), "a/0", f"{late}/0")
        bed.cluster.start(start)
        bed.wait(ready(start))
        bed.lose_node(late)

        def lost(observed: Observed) -> bool:
            ranks = of(observed, start)
            there = {node.name for node in observed.topology.nodes}
            return late not in there and (1 not in ranks or ranks[1].state is RankState.LOST)

        assert of(bed.wait(lost), start)[0].state is RankState.READY
        bed.cluster.stop(StopRank(replica=start.spec.id, rank=0, why="the test is over"))
        bed.wait(lambda seen: all(rank.state is RankState.LOST for rank in of(seen, start).values()))
