"""Ray on this machine for tests: several raylets on loopback, each a node of two devices."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

from slipstream.placement.topology import DeviceType, Link
from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.controller.launch import Launch
from slipstream.runtime.controller.node_facts import DEVICE_RESOURCE, NAME_LABEL
from slipstream.runtime.reconcile.actions import StopRank
from slipstream.runtime.reconcile.observed import Observed, ReplicaId
from slipstream.tests.contracts.cluster import FAILS, WELL

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")
ray_cluster = pytest.importorskip("slipstream.runtime.controller.ray_cluster")

PATIENCE_S = 60.0
LINK = Link(bytes_per_s=1e9, latency_s=1e-4)
DEVICE_TYPES = {"cpu": DeviceType(name="cpu", memory_bytes=1 << 30, flops={}, memory_bytes_per_s=1e9)}
_PROGRAM = "slipstream.tests.fakes.rank_program"
LAUNCHES = {
    WELL: Launch(module=_PROGRAM, arguments=("{address}", "{rank}")),
    FAILS: Launch(module=_PROGRAM, arguments=("{address}", "{rank}", "fail")),
}
# Seconds instead of a minute until a node is given up; and no questions from other machines on loopback.
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "1000",
    "PYTHONSAFEPATH": "1",
}
_PAUSE_S = 0.1


T = TypeVar("T")


def until(look: Callable[[], T], check: Callable[[T], bool]) -> T:
    """Look until it is as it should be."""
    deadline_s, never = monotonic_clock() + PATIENCE_S, threading.Event()
    while True:
        seen = look()
        if check(seen):
            return seen
        assert monotonic_clock() < deadline_s, f"it has not become so within {PATIENCE_S:g} s: {seen}"
        never.wait(_PAUSE_S)


class RayNodes:
    """Raylets that come and go."""

    def __init__(self) -> None:
        self._cluster = cluster_utils.Cluster()
        self._nodes: dict[str, object] = {}

    def add(self, name: str) -> None:
        self._nodes[name] = self._cluster.add_node(
            num_cpus=2,
            include_dashboard=False,
            resources={f"{DEVICE_RESOURCE}{index}": 1 for index in range(2)},
            labels={NAME_LABEL: name},
            object_store_memory=80 << 20,
        )

    def lose(self, name: str) -> None:
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def shutdown(self) -> None:
        self._cluster.shutdown()


@contextmanager
def ray_nodes(monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[RayNodes]:
    """Start raylets with these names and connect this process to them."""
    for name, value in _ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    nodes = RayNodes()
    try:
        for name in names:
            nodes.add(name)
        # Ray puts the folder of who connects on the path of all that runs there.
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir(tempfile.gettempdir())
            ray.init(address=nodes.address, namespace="tests", log_to_driver=False)
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


class RayBed:
    """A ``Bed`` on Ray."""

    def __init__(self, nodes: RayNodes) -> None:
        self._nodes = nodes
        self.cluster = self.again()

    def again(self):
        return ray_cluster.RayCluster(
            deployment="contract",
            device_types=DEVICE_TYPES,
            network=LINK,
            device_link=LINK,
            clock=monotonic_clock,
            launches=LAUNCHES,
        )

    def wait(self, check: Callable[[Observed], bool]) -> Observed:
        return until(self.cluster.observe, check)

    def kill_rank(self, replica: ReplicaId, rank: int) -> None:
        os.kill(self.cluster.processes()[f"rank/{replica}/{rank}"], signal.SIGKILL)

    def add_node(self) -> str:
        self._nodes.add("late")
        return "late"

    def lose_node(self, name: str) -> None:
        self._nodes.lose(name)

    def close(self) -> None:
        """End what a test has left behind."""
        for rank in self.cluster.observe().ranks:
            self.cluster.stop(StopRank(replica=rank.spec.id, rank=rank.rank, why="the test is over"))
        self.wait(lambda seen: not seen.ranks)
