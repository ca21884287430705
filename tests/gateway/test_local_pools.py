"""Local pools over drivers that are not processes: who is in the view, who takes whose place, what a start costs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from slipstream.placement.plan import Degrees, Role
from slipstream.runtime.config import EngineOptions
from slipstream.runtime.driver_command import role_arguments
from slipstream.runtime.gateway.local_pools import MAX_REPLICAS, LocalPools, LocalSplit
from slipstream.runtime.rpc.view_source import ViewBoard
from slipstream.sdk.errors import ConfigError, EngineUnavailable
from slipstream.tests.gateway.harness import asynchronous, until
from slipstream.tests.gateway.test_supervisor import Client, FakeDriver


class Followers:
    """Replicas that follow views, or fail at it."""

    def __init__(self) -> None:
        self.stopped: list[float] = []
        self.cancelled = False

    async def run(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled = True

    async def stop(self, *, timeout_s: float) -> None:
        self.stopped.append(timeout_s)


class World:
    """Pools, with the drivers that they have started, by the replicas' names; those of ``failing`` do not come up."""

    def __init__(self, *, prefill: int = 1, decode: int = 1, failing: frozenset[str] = frozenset()) -> None:
        self.board = ViewBoard()
        self.drivers: dict[str, FakeDriver] = {}
        self.roles: dict[str, Role] = {}
        self.followers = Followers()
        self._failing = failing
        self.pools = LocalPools(
            LocalSplit(prefill=prefill, decode=decode).pools,
            engine=EngineOptions(model="m", tensor_parallel_size=2),
            launch=self._launch,
            make_client=lambda address: Client(),
            board=self.board,
            replicas=self.followers,
            clock=lambda: 0.0,
        )

    async def _launch(self, replica: str, role: Role) -> FakeDriver:
        self.roles[replica] = role
        if replica in self._failing:
            raise EngineUnavailable("ended before it was ready")
        self.drivers[replica] = FakeDriver(f"unix:/{replica}")
        return self.drivers[replica]

    @property
    def seen(self) -> dict[str, Role]:
        return {each.replica: each.role for each in self.board.newest.replicas}


@asynchronous
async def test_all_that_answer_are_in_the_view_and_what_is_lost_gets_another_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("slipstream.runtime.gateway.supervisor._FIRST_PAUSE_S", 0.001)
    world = World(prefill=2, decode=1)
    running = asyncio.create_task(world.pools.run())
    await until(lambda: world.pools.whole)
    assert world.seen == {"prefill-1": Role.PREFILL, "prefill-2": Role.PREFILL, "decode-3": Role.DECODE}
    assert world.seen == world.roles
    view = world.board.newest
    assert [(pool.name, pool.wanted) for pool in view.pools] == [("prefill", 2), ("decode", 1)]
    assert {each.address for each in view.replicas} == {f"unix:/{name}" for name in world.seen}
    assert all(each.degrees == Degrees(tp=2) for each in view.replicas)

    epoch = view.epoch
    world.drivers["decode-3"].ended.set()
    await until(lambda: "decode-3" not in world.seen)
    assert not world.pools.whole and set(world.seen) == {"prefill-1", "prefill-2"}
    await until(lambda: world.pools.whole)
    assert set(world.seen) == {"prefill-1", "prefill-2", "decode-4"} and world.board.newest.epoch == epoch + 2

    await world.pools.stop(timeout_s=3.0)
    await running
    assert world.followers.stopped == [3.0] and world.followers.cancelled and world.seen == {}
    assert all(world.drivers[name].stopped_politely for name in ("prefill-1", "prefill-2", "decode-4"))


@asynchronous
async def test_a_first_start_that_fails_is_the_end_of_all() -> None:
    world = World(failing=frozenset({"decode-2"}))
    with pytest.raises(EngineUnavailable, match="ended before it was ready"):
        await world.pools.run()
    await world.pools.stop(timeout_s=0.0)
    assert world.followers.cancelled and all(driver.ended.is_set() for driver in world.drivers.values())


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"prefill": 1, "decode": 0}, "decode"),
        ({"prefill": 0, "decode": 2}, "prefill"),
        ({"prefill": -1, "decode": 1}, "prefill"),
        ({"prefill": MAX_REPLICAS, "decode": 1}, "replicas are the most"),
        ({"prefill": 1, "decode": 1, "kv_transport": "carrier pigeon"}, "kv_transport"),
        ({"prefill": 1, "decode": 1, "kv_transfer_dtype": "int8"}, "kv_transfer_dtype: must be one of auto, fp8, got"),
        ({"prefill": 1, "decode": 1, "split_from_tokens": 0}, "split_from_tokens"),
    ],
)
def test_a_split_that_cannot_be_is_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        LocalSplit(**options)


def test_only_who_shares_the_work_is_told_how() -> None:
    assert role_arguments(Role.MIXED, kv_transport="auto", kv_address="h", across_hosts=True) == ()
    told = role_arguments(Role.DECODE, kv_transport="shm", kv_address="h", across_hosts=False)
    assert told == ("--role", "decode", "--kv-transport", "shm", "--kv-address", "h")
    far = role_arguments(Role.PREFILL, kv_transport="tcp", kv_address="h", across_hosts=True)
    assert far[:2] == ("--role", "prefill") and far[-1] == "--kv-across-hosts"
    small = role_arguments(Role.DECODE, kv_transport="shm", kv_address="h", across_hosts=False, transfer_dtype="fp8")
    assert small == (*told, "--kv-transfer-dtype", "fp8")
