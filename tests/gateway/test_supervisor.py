"""The supervisor over drivers that are not processes: starts, losses, restarts, stops."""

from __future__ import annotations

import asyncio

import pytest

from slipstream.runtime.gateway.driver_process import driver_environment
from slipstream.runtime.gateway.replica import Replica, model_text
from slipstream.runtime.gateway.supervisor import Supervisor
from slipstream.runtime.models.generation_defaults import GenerationDefaults
from slipstream.runtime.rpc.backoff import Backoff
from slipstream.sdk.errors import EngineUnavailable, SlipstreamError
from slipstream.tests.fakes.scripted_engine import ScriptedEngine
from slipstream.tests.gateway.harness import asynchronous, make_tokenizer, until


class FakeDriver:
    """A driver that runs until it is told not to."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.ended = asyncio.Event()
        self.stopped_politely = False

    async def wait(self) -> int:
        await self.ended.wait()
        return -9

    async def stop(self, *, timeout_s: float) -> None:
        self.stopped_politely = True
        self.ended.set()

    async def kill(self) -> None:
        self.ended.set()


class Client(ScriptedEngine):
    """A client that can lose its replica."""

    def __init__(self, *, reachable: bool = True) -> None:
        super().__init__(vocab_size=100)
        self.lost = asyncio.Event()
        self._reachable = reachable
        self.closed = False

    async def connect(self, *, timeout_s: float):
        if not self._reachable:
            raise EngineUnavailable("does not answer")
        return await super().connect(timeout_s=timeout_s)

    async def wait_lost(self) -> SlipstreamError:
        await self.lost.wait()
        return EngineUnavailable("lost")

    async def close(self) -> None:
        self.closed = True


class World:
    """A supervisor with its drivers; ``failures`` starts fail, the first ones or later ones."""

    def __init__(self) -> None:
        self.replica = Replica(model_text(make_tokenizer(), GenerationDefaults()))
        self.drivers: list[FakeDriver] = []
        self.clients: list[Client] = []
        self.failing: set[int] = set()
        self.starts = 0
        self.ready = 0
        self.supervisor = Supervisor(
            self.replica, launch=self._launch, make_client=self._make_client, clock=lambda: 0.0, on_ready=self._ready
        )

    async def _launch(self) -> FakeDriver:
        self.starts += 1
        if self.starts in self.failing:
            raise EngineUnavailable("ended before it was ready")
        self.drivers.append(FakeDriver(str(self.starts)))
        return self.drivers[-1]

    def _make_client(self, address: str) -> Client:
        self.clients.append(Client())
        return self.clients[-1]

    def _ready(self) -> None:
        self.ready += 1


@pytest.mark.parametrize("how", ["process", "connection"])
@asynchronous
async def test_a_lost_driver_is_replaced(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slipstream.runtime.gateway.supervisor._FIRST_PAUSE_S", 0.001)
    world = World()
    world.failing = {2}
    running = asyncio.create_task(world.supervisor.run())
    await until(lambda: world.replica.attached)
    (world.drivers[0].ended if how == "process" else world.clients[0].lost).set()
    await until(lambda: not world.replica.attached)
    # The second start fails; the third does not.
    await until(lambda: world.replica.attached)
    assert world.starts == 3 and world.ready == 2
    assert world.clients[0].closed and world.drivers[0].ended.is_set()
    await world.supervisor.stop(timeout_s=1.0)
    await running
    assert world.drivers[-1].stopped_politely and not world.replica.attached


@asynchronous
async def test_a_first_start_that_fails_is_the_end() -> None:
    world = World()
    world.failing = {1}
    with pytest.raises(EngineUnavailable):
        await world.supervisor.run()


def test_pauses_grow_and_shrink() -> None:
    backoff = Backoff()
    pauses = [backoff.pause_s(lasted_s=1.0) for _ in range(10)]
    assert pauses == sorted(pauses) and pauses[0] == 0.5 and pauses[-1] == 30.0
    assert backoff.pause_s(lasted_s=1000.0) == 0.5


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=3", "glibc.malloc.check=3:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_a_driver_gets_huge_pages_unless_somebody_has_chosen(before: str | None, after: str) -> None:
    given = {"PATH": "/bin"} if before is None else {"PATH": "/bin", "GLIBC_TUNABLES": before}
    assert driver_environment(given) == {"PATH": "/bin", "GLIBC_TUNABLES": after}
