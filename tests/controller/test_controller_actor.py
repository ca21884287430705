"""The controller as an actor of Ray, with a real model: up, served, killed and back, repaired, down."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import slipstream
from slipstream.placement.plan import Degrees, Role
from slipstream.runtime.controller.controller import Status
from slipstream.runtime.controller.launch import Launch
from slipstream.runtime.controller.ledger import Deployment
from slipstream.runtime.controller.records import from_json, to_json
from slipstream.runtime.messages import EngineRequest
from slipstream.runtime.reconcile.desired import Desired, Limits, PoolWish
from slipstream.runtime.rpc.client import GrpcEngineClient
from slipstream.sdk.params import SamplingParams
from slipstream.tests.controller.ray_bed import (
    DEVICE_TYPES,
    LINK,
    PATIENCE_S,
    RayNodes,
    ray,
    ray_cluster,
    ray_nodes,
    until,
)
from slipstream.tests.fakes.first_fit import first_fit

controller_actor = pytest.importorskip("slipstream.runtime.controller.controller_actor")

MODEL = Path(slipstream.__file__).parent / "examples" / "demo_model"
NAME = "up"


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with pytest.MonkeyPatch.context() as patch, ray_nodes(patch, "a", "b") as found:
        yield found


def deployment(replicas: int) -> Deployment:
    pool = PoolWish(name="mixed", role=Role.MIXED, degrees=Degrees(), replicas=replicas)
    options = ("--num-threads", "1", "--max-model-len", "256", "--max-num-seqs", "4")
    return Deployment(
        desired=Desired(pools=(pool,)),
        launches={"mixed": Launch(arguments=("--listen", "{address}:0", *options, str(MODEL)))},
    )


def tokens(address: str) -> list[int]:
    """Ask a replica for a few tokens, directly."""

    async def ask() -> list[int]:
        client = GrpcEngineClient(address)
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


def test_a_deployment_comes_up_outlives_its_controller_is_repaired_and_goes(nodes: RayNodes) -> None:
    settings = controller_actor.ControllerSettings(
        deployment=NAME,
        limits=Limits(starting_s=60.0, loading_s=60.0, drain_s=5.0),
        device_types=DEVICE_TYPES,
        network=LINK,
        device_link=LINK,
    )
    controller = controller_actor.start_controller(settings, first_fit)

    def status() -> Status:
        try:
            return from_json(Status, ray.get(controller.status.remote(), timeout=PATIENCE_S))
        except ray.exceptions.RayActorError:
            return Status(problem="the controller is starting again")

    def serve(seen: Status, count: int) -> bool:
        return [(replica.phase, replica.routed) for replica in seen.replicas] == [("ready", True)] * count

    ray.get(controller.want.remote(to_json(deployment(2))), timeout=PATIENCE_S)
    up = until(status, lambda seen: serve(seen, 2))
    assert [replica.devices for replica in up.replicas] == [("a/0",), ("a/1",)]
    answers = {tuple(tokens(replica.address)) for replica in up.replicas}
    assert len(answers) == 1 and len(*answers) == 8

    # Without a controller replicas serve; a new one finds them as they are.
    os.kill(ray.get(controller.pid.remote(), timeout=PATIENCE_S), signal.SIGKILL)
    assert {tuple(tokens(replica.address)) for replica in up.replicas} == answers
    back = until(status, lambda seen: serve(seen, 2))
    assert [(each.replica, each.address) for each in back.replicas] == [
        (each.replica, each.address) for each in up.replicas
    ]
    assert back.epoch == up.epoch

    # A rank that dies is replaced.
    looking = ray_cluster.RayCluster(
        deployment=NAME, device_types=DEVICE_TYPES, network=LINK, device_link=LINK, clock=lambda: 0.0
    )
    until(lambda: (looking.observe(), looking.processes())[1], lambda found: len(found) == 2)
    os.kill(looking.processes()["rank/mixed-1/0"], signal.SIGKILL)
    repaired = until(status, lambda seen: [each.replica for each in seen.replicas] == ["mixed-2", "mixed-3"])
    repaired = until(status, lambda seen: serve(seen, 2))
    assert tuple(tokens(repaired.replicas[1].address)) in answers

    # More than there is: what is missing is said, and what serves goes on.
    ray.get(controller.want.remote(to_json(deployment(5))), timeout=PATIENCE_S)
    short = until(status, lambda seen: serve(seen, 4))
    assert [shortage.pool for shortage in short.shortages] == ["mixed"] and "1 devices are needed" in short.shortages[
        0
    ].why

    ray.get(controller.want.remote(to_json(Deployment())), timeout=PATIENCE_S)
    until(status, lambda seen: not seen.replicas)
    controller_actor.end_controller(NAME)
    until(lambda: ray.util.list_named_actors(all_namespaces=True), lambda actors: not actors)
