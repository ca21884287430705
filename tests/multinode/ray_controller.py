"""What runs on one of several hosts: starts the controller, and does what it is told by lines on standard input.

    {"want": [["p", 3, 1], ...]}                    pools: name, tp, replicas
    {"nodes": 3}                                    waits for so many nodes, and answers in any case
    {"until": [["p", ["a/0"]], ...], "short": 1}    waits for these replicas to serve, and so many shortages
    {"routed": [["p", ["a/0"]], ...]}               waits for these to be the only ones that gateways are told of
    {"down": true}                                  ends the deployment

Each is answered by a line: the seconds that it took and the status.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import ray

from slipstream.placement.plan import Degrees, Role
from slipstream.placement.topology import DeviceType, Link
from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.controller.controller import Status
from slipstream.runtime.controller.controller_actor import ControllerSettings, end_controller, start_controller
from slipstream.runtime.controller.launch import Launch
from slipstream.runtime.controller.ledger import Deployment
from slipstream.runtime.controller.records import from_json, to_json
from slipstream.runtime.reconcile.desired import Desired, Limits, PoolWish
from slipstream.tests.fakes.first_fit import first_fit

NAME = "hosts"
PATIENCE_S = 90.0
NODES_PATIENCE_S = 60.0
LINK = Link(bytes_per_s=1e9, latency_s=1e-4)
PROGRAM = Launch(module="slipstream.tests.fakes.rank_program", arguments=("{address}", "{rank}"))


def main(address: str) -> int:
    ray.init(address=f"{address}:6379", _node_ip_address=address, namespace="tests", log_to_driver=False)
    settings = ControllerSettings(
        deployment=NAME,
        limits=Limits(starting_s=60.0, loading_s=60.0, drain_s=2.0),
        device_types={"cpu": DeviceType(name="cpu", memory_bytes=1 << 30, flops={}, memory_bytes_per_s=1e9)},
        network=LINK,
        device_link=LINK,
    )
    controller = start_controller(settings, first_fit)
    print(json.dumps({"controller": True}), flush=True)
    for line in sys.stdin:
        began_s = monotonic_clock()
        match json.loads(line):
            case {"want": pools}:
                wishes = [
                    PoolWish(name=name, role=Role.MIXED, degrees=Degrees(tp=tp), replicas=replicas)
                    for name, tp, replicas in pools
                ]
                wanted = Deployment(
                    desired=Desired(pools=tuple(wishes)), launches=dict.fromkeys((w.name for w in wishes), PROGRAM)
                )
                ray.get(controller.want.remote(to_json(wanted)), timeout=PATIENCE_S)
                status = Status()
            case {"until": places, "short": short}:
                status = wait(controller, places, short)
            case {"nodes": count}:
                status = wait_for_nodes(controller, count)
            case {"routed": places}:
                status = wait(controller, places, None)
            case {"down": True}:
                ray.get(controller.want.remote(to_json(Deployment())), timeout=PATIENCE_S)
                status = wait(controller, [], 0)
                end_controller(NAME)
        answer = {"seconds": round(monotonic_clock() - began_s, 2), "status": json.loads(to_json(status))}
        print(json.dumps(answer), flush=True)
    ray.shutdown()
    return 0


def wait_for_nodes(controller: Any, count: int) -> Status:
    """Look for a while until there are so many nodes."""
    never, deadline_s = threading.Event(), monotonic_clock() + NODES_PATIENCE_S
    while True:
        status = from_json(Status, ray.get(controller.status.remote(), timeout=PATIENCE_S))
        if len(status.nodes) == count or monotonic_clock() >= deadline_s:
            return status
        never.wait(0.05)


def wait(controller: Any, places: list[list[Any]], short: int | None) -> Status:
    """Look until these replicas serve, on these devices; with ``short``, no others are there, and so many lack."""
    never, deadline_s = threading.Event(), monotonic_clock() + PATIENCE_S
    status = Status()
    while monotonic_clock() < deadline_s:
        status = from_json(Status, ray.get(controller.status.remote(), timeout=PATIENCE_S))
        found = sorted([each.pool, list(each.devices)] for each in status.replicas if each.routed)
        rest = len(status.replicas) == len(found) and len(status.shortages) == short
        if found == sorted(places) and (short is None or rest):
            return status
        never.wait(0.05)
    raise TimeoutError(f"it has not become so: {status}")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
