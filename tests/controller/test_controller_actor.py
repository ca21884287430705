"""The controller as an actor of Ray, with a real model: up, served, killed and back, repaired, down."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest

import slipstream
from slipstream.placement.plan import Degrees, Role
from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.controller.controller import Status
from slipstream.runtime.controller.launch import Launch
from slipstream.runtime.controller.ledger import Deployment
from slipstream.runtime.controller.records import from_json, to_json
from slipstream.runtime.messages import EngineRequest
from slipstream.runtime.reconcile.desired import Desired, Limits, PoolWish
from slipstream.runtime.reconcile.views import View
from slipstream.runtime.rpc.backoff import no_jitter
from slipstream.runtime.rpc.client import GrpcEngineClient
from slipstream.runtime.rpc.view_watch import ViewWatch
from slipstream.sdk.params import SamplingParams
from slipstream.tests.contracts.cluster import WELL
from slipstream.tests.controller.ray_bed import (
    DEVICE_TYPES,
    LAUNCHES,
    LINK,
    PATIENCE_S,
    RayNodes,
    ray,
    ray_cluster,
    until,
)
from slipstream.tests.fakes.first_fit import first_fit


def free_port() -> int:
    """Return a port of loopback that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port: int = bound.getsockname()[1]
        return port


controller_actor = pytest.importorskip("slipstream.runtime.controller.controller_actor")

SECRET = "the secret of a test's cluster"
MODEL = Path(slipstream.__file__).parent / "examples" / "demo_model"
SETTINGS = controller_actor.ControllerSettings(
    deployment="up",
    limits=Limits(starting_s=60.0, loading_s=60.0, drain_s=5.0),
    device_types=DEVICE_TYPES,
    network=LINK,
    device_link=LINK,
    watch_address=f"127.0.0.1:{free_port()}",
    secret=SECRET,
)


OPTIONS = ("--num-threads", "1", "--max-model-len", "256", "--max-num-seqs", "4")
REAL = Launch(arguments=("--listen", "{address}:0", *OPTIONS, str(MODEL)), environment={"SLIPSTREAM_SECRET": SECRET})


class Up:
    """A controller and how what it keeps is doing."""

    def __init__(self) -> None:
        self.controller = controller_actor.start_controller(SETTINGS, first_fit)

    def want(self, replicas: int, launch: Launch) -> None:
        pool = PoolWish(name="mixed", role=Role.MIXED, degrees=Degrees(), replicas=replicas)
        wanted = Deployment(desired=Desired(pools=(pool,)), launches={"mixed": launch})
        ray.get(self.controller.want.remote(to_json(wanted)), timeout=PATIENCE_S)

    def status(self) -> Status:
        try:
            return from_json(Status, ray.get(self.controller.status.remote(), timeout=PATIENCE_S))
        except ray.exceptions.RayActorError:
            return Status(problem="the controller is starting again")

    def until(self, what: str, check: Callable[[Status], bool]) -> Status:
        """Wait until the status is so, and print how long it took."""
        began_s = monotonic_clock()
        found = until(self.status, check)
        print(f"{what}: {monotonic_clock() - began_s:.1f} s")
        return found

    def down(self) -> None:
        """End the deployment; nothing may be left of it."""
        ray.get(self.controller.want.remote(to_json(Deployment())), timeout=PATIENCE_S)
        self.until("down", lambda seen: not seen.replicas)
        controller_actor.end_controller(SETTINGS.deployment)
        until(lambda: ray.util.list_named_actors(all_namespaces=True), lambda actors: not actors)


@pytest.fixture
def up(nodes: RayNodes) -> Iterator[Up]:
    deployment = Up()
    yield deployment
    deployment.down()


def serve(count: int, *on: str) -> Callable[[Status], bool]:
    """Whether so many replicas serve, and no others are there; on these devices, if any are named."""

    def check(seen: Status) -> bool:
        devices = [device for replica in seen.replicas for device in replica.devices]
        served = [(replica.phase, replica.routed) for replica in seen.replicas]
        return served == [("ready", True)] * count and (not on or devices == list(on))

    return check


def tokens(address: str) -> list[int]:
    """Ask a replica for a few tokens, directly."""

    async def ask() -> list[int]:
        client = GrpcEngineClient(address, secret=SECRET.encode())
        try:
            await client.connect(timeout_s=PATIENCE_S)
            request = EngineRequest(
                request_id="one",
                prompt_token_ids=np.array([5, 6, 7], np.int32),
                params=SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, detokenize=False),
                seed=1,
                stop_ids=(),
                max_tokens=8,
                arrival_time_s=0.0,
            )
            found: list[int] = []
            async for event in client.generate(request, timeout_s=PATIENCE_S):
                for sample in event.samples:
                    found += sample.token_ids
            return found
        finally:
            await client.close()

    return asyncio.run(ask())


def watched(epoch: int) -> View:
    """Watch as gateways do until a view comes that is at least of an epoch."""

    async def watch() -> View:
        address = SETTINGS.watch_address
        source = ViewWatch([address], clock=monotonic_clock, jitter=no_jitter, secret=SECRET.encode())
        async with asyncio.timeout(PATIENCE_S), aclosing(source.views()) as views:
            async for view in views:
                if view.epoch >= epoch:
                    return view
        raise AssertionError("views never end")

    return asyncio.run(watch())


def test_a_deployment_comes_up_outlives_its_controller_and_is_repaired(up: Up) -> None:
    up.want(2, REAL)
    first = up.until("two replicas of a real model serve", serve(2, "a/0", "a/1"))
    answers = {tuple(tokens(replica.address)) for replica in first.replicas}
    assert len(answers) == 1 and len(*answers) == 8
    assert [replica.address for replica in watched(first.epoch).replicas] == [each.address for each in first.replicas]

    # Without a controller replicas serve; a new one finds them as they are.
    os.kill(ray.get(up.controller.pid.remote(), timeout=PATIENCE_S), signal.SIGKILL)
    assert {tuple(tokens(replica.address)) for replica in first.replicas} == answers
    back = up.until("a killed controller has adopted them", serve(2))
    assert [(each.replica, each.address) for each in back.replicas] == [
        (each.replica, each.address) for each in first.replicas
    ]
    assert back.epoch == first.epoch
    # At the same address, the view that was published before it came.
    assert watched(1).epoch == first.epoch

    # A rank that dies is replaced.
    looking = ray_cluster.RayCluster(
        deployment=SETTINGS.deployment,
        device_types=DEVICE_TYPES,
        network=LINK,
        device_link=LINK,
        clock=monotonic_clock,
    )
    until(lambda: (looking.observe(), looking.processes())[1], lambda found: len(found) == 2)
    os.kill(looking.processes()[f"rank/{first.replicas[0].replica}/0"], signal.SIGKILL)
    lost = first.replicas[0].replica
    up.until("a killed rank is seen", lambda seen: not any(r.routed for r in seen.replicas if r.replica == lost))
    repaired = up.until("and replaced", serve(2))
    assert tuple(tokens(repaired.replicas[1].address)) in answers and repaired.epoch > first.epoch


def test_a_lost_node_is_seen_what_is_missing_is_said_and_a_late_node_is_used(up: Up, nodes: RayNodes) -> None:
    up.want(4, LAUNCHES[WELL])
    up.until("four replicas serve", serve(4, "a/0", "a/1", "b/0", "b/1"))
    nodes.lose("b")
    up.until("a lost node is seen", lambda seen: len(seen.nodes) == 1)
    short = up.until("and what is left serves", serve(2, "a/0", "a/1"))
    assert [shortage.pool for shortage in short.shortages] == ["mixed"] * 2
    assert "1 devices are needed and 0 are free" in short.shortages[0].why
    nodes.add("b")
    up.until("a node that comes late is used", serve(4, "a/0", "a/1", "b/0", "b/1"))
