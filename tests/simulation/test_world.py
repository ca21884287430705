"""The imagined cluster keeps the contract of real ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from slipstream.runtime.controller.cluster import Cluster
from slipstream.runtime.reconcile.observed import Observed, ReplicaId
from slipstream.tests.contracts.cluster import FAILS, Bed, ClusterContract
from slipstream.tests.simulation.judge import Judge
from slipstream.tests.simulation.sequences import LIMITS
from slipstream.tests.simulation.world import World

_MOST_SECONDS = 200


class _Lenient(Judge):
    """Lets everything pass: the contract starts and stops what no controller would."""

    def starts(self, *_: object, **__: object) -> None:
        pass

    stops = unroutes = publishes = starts


class WorldBed:
    """A world in which time passes whenever it is looked at."""

    def __init__(self, seed: int) -> None:
        self.world = World(draw=random.Random(seed), judge=_Lenient(limits=LIMITS), failing_pools=frozenset({FAILS}))
        for name in ("a", "b"):
            self._join(name)
        self.cluster: Cluster = self.world

    def again(self) -> Cluster:
        return self.world

    def wait(self, check: Callable[[Observed], bool]) -> Observed:
        for _ in range(_MOST_SECONDS):
            observed = self.world.observe()
            if check(observed):
                return observed
            self.world.pass_time(1.0)
        raise AssertionError("it does not become so")

    def kill_rank(self, replica: ReplicaId, rank: int) -> None:
        self.world.end_process((replica, rank), listed=True)

    def add_node(self) -> str:
        self._join("c")
        return "c"

    def lose_node(self, name: str) -> None:
        self.world.lose_node(name)

    def _join(self, name: str) -> None:
        self.world.add_node(name, devices=2, device_type="small", rack="a", taken=frozenset())


class TestWorld(ClusterContract):
    @pytest.fixture
    def bed(self, seed: int) -> Iterator[Bed]:
        yield WorldBed(seed)
