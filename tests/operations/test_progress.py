"""What is told of two looks at a deployment, and when it is as wanted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slipstream.placement.plan import Degrees, Role, Shortage
from slipstream.runtime.controller.controller import NodeStatus, PoolStatus, RankStatus, ReplicaStatus
from slipstream.runtime.controller.gateway_keeper import GatewayReport, GatewayState
from slipstream.runtime.controller.ledger import Deployment
from slipstream.runtime.controller.records import from_json, to_json
from slipstream.runtime.operations.progress import Verdict, events, judge, missing
from slipstream.runtime.operations.status import UNKNOWN, DeploymentStatus
from slipstream.runtime.reconcile.desired import Desired, PoolWish

WANTED = Deployment(desired=Desired(pools=(PoolWish(name="p", role=Role.MIXED, degrees=Degrees(), replicas=2),)))
SHORTAGE = Shortage(pool="p", needed=1, found=0, why="1 device is needed and 0 are free")


def replica(number: int, *, phase: str = "ready", routed: bool = True, node: str = "a", loaded: float = 1.0):
    state = {"ready": "ready", "loading": "loading", UNKNOWN: UNKNOWN}.get(phase, "ready")
    return ReplicaStatus(
        replica=f"p-{number}",
        pool="p",
        generation="1.1",
        phase=phase,
        routed=routed,
        devices=(f"{node}/{number}",),
        address=f"{node}:500{number}",
        why="",
        ranks=(RankStatus(rank=0, device=f"{node}/{number}", state=state, loaded=loaded),),
    )


def pool(serving: int, **changes: int) -> PoolStatus:
    wanted = changes.pop("wanted", 2)
    return PoolStatus(
        pool="p", role="mixed", degrees=Degrees(), generation="1.1", wanted=wanted, serving=serving, **changes
    )


def seen(*replicas: ReplicaStatus, pools: tuple[PoolStatus, ...] | None = None, **changes: object) -> DeploymentStatus:
    made = DeploymentStatus(
        name="d",
        ray="r:1",
        model="/m",
        served_names=("m",),
        controller=True,
        epoch=3,
        pools=(pool(len(replicas)),) if pools is None else pools,
        replicas=replicas,
        nodes=(NodeStatus(name="a", address="10.0.0.1", device_type="cpu", devices=4),),
        gateways=(GatewayReport(name="0", node="a", state=GatewayState.READY, address="10.0.0.1:8000"),),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


BOTH = (replica(1), replica(2))


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        (seen(*BOTH), Verdict.AS_WANTED),
        (seen(*BOTH, problem="a round failed"), Verdict.COMING),
        (seen(*BOTH, controller=False), Verdict.COMING),
        # It has not heard of what is wanted yet.
        (seen(*BOTH, pools=(pool(2, wanted=3),)), Verdict.COMING),
        (seen(*BOTH, pools=()), Verdict.COMING),
        (seen(*BOTH, cordoned=("a",)), Verdict.COMING),
        (seen(replica(1), replica(2, routed=False), pools=(pool(1, coming=1),)), Verdict.COMING),
        (seen(*BOTH, replica(3, phase="draining", routed=False), pools=(pool(2, leaving=1),)), Verdict.COMING),
        (seen(*BOTH, gateways=(GatewayReport(name="0"),)), Verdict.COMING),
        (seen(replica(1)), Verdict.COMING),
        (seen(replica(1), shortages=(SHORTAGE,)), Verdict.SHORT),
        (seen(shortages=(SHORTAGE,)), Verdict.SHORT),
        (seen(replica(1, phase="loading", routed=False), pools=(pool(0),), shortages=(SHORTAGE,)), Verdict.COMING),
        (seen(pools=(pool(0, failures=2),)), Verdict.COMING),
        (seen(pools=(pool(0, failures=3),)), Verdict.FAILING),
        (seen(replica(1), pools=(pool(1, failures=3),)), Verdict.COMING),
    ],
)
def test_how_near_it_is(status: DeploymentStatus, verdict: Verdict) -> None:
    assert judge(status, WANTED) is verdict


def test_failures_from_before_do_not_count_until_there_is_another() -> None:
    assert judge(seen(pools=(pool(0, failures=4),)), WANTED, {"p": 4}) is Verdict.COMING
    assert judge(seen(pools=(pool(0, failures=5),)), WANTED, {"p": 4}) is Verdict.FAILING


def test_nothing_may_be_left_on_what_is_drained() -> None:
    drained = replace(WANTED, desired=replace(WANTED.desired, cordoned=frozenset({"a"})))
    assert judge(seen(*BOTH, cordoned=("a",)), drained) is Verdict.COMING
    assert judge(seen(replica(1, node="b"), replica(2, node="b"), cordoned=("a",)), drained) is Verdict.AS_WANTED
    leaving = replace(WANTED, desired=replace(WANTED.desired, leaving=frozenset({"p-2"})))
    assert judge(seen(*BOTH, leaving=("p-2",)), leaving) is Verdict.COMING
    assert judge(seen(replica(1), replica(3), leaving=("p-2",)), leaving) is Verdict.AS_WANTED


def test_what_is_missing_is_named() -> None:
    status = seen(
        replica(1),
        pools=(pool(1, coming=1, failures=2),),
        shortages=(SHORTAGE, SHORTAGE),
        gateways=(GatewayReport(name="0", state=GatewayState.PAUSED, detail="its process ended with status 1"),),
        problem="p-3 was not started",
    )
    assert missing(status) == [
        "pool p: 1 of 2 replicas serve, 1 on their way, 2 starts have failed",
        "  1 device is needed and 0 are free",
        "gateway 0: paused: its process ended with status 1",
        "p-3 was not started",
    ]
    assert missing(seen(*BOTH)) == []


def told(before: DeploymentStatus | None, after: DeploymentStatus) -> list[str]:
    return [event.text for event in events(before, after)]


def test_a_life_is_told_step_by_step() -> None:
    empty = seen(pools=(pool(0),), gateways=(GatewayReport(name="0", node="a", state=GatewayState.STARTING),))
    assert told(None, empty) == ["node a at 10.0.0.1: 4 x cpu", "gateway 0 on a: starting"]
    loading = seen(replica(1, phase="loading", routed=False, loaded=0.0), pools=(pool(0, coming=1),))
    assert told(empty, loading) == [
        "p-1, generation 1.1, on a/1",
        "p-1 rank 0 on a/1: loading",
        "gateway 0 on a: ready at http://10.0.0.1:8000/v1",
    ]
    further = seen(replica(1, phase="loading", routed=False, loaded=0.3), pools=(pool(0, coming=1),))
    assert told(loading, further) == ["p-1 rank 0 on a/1: loading, 30% of its weights"]
    same_quarter = seen(replica(1, phase="loading", routed=False, loaded=0.4), pools=(pool(0, coming=1),))
    assert told(further, same_quarter) == []
    up = seen(replica(1))
    assert told(same_quarter, up) == ["p-1 rank 0 on a/1: ready", "p-1 serves at a:5001"]
    assert told(up, up) == []
    broken = seen(replace(replica(1, phase="broken", routed=False), why="rank 0 failed: killed"), pools=(pool(0),))
    assert told(up, broken) == ["p-1 broken: rank 0 failed: killed"]
    short = seen(pools=(pool(0, failures=1),), shortages=(SHORTAGE, SHORTAGE), nodes=())
    assert told(broken, short) == [
        "node a is gone",
        "p-1 has ended",
        "pool p: 1 device is needed and 0 are free",
        "pool p: 1 starts have failed",
    ]


def test_a_controller_that_is_down_hides_nothing_and_invents_nothing() -> None:
    up = seen(*BOTH)
    down = seen(
        replica(1, phase=UNKNOWN), replica(2, phase=UNKNOWN), nodes=(), controller=False, controller_detail="it ended"
    )
    assert told(up, down) == ["it ended; what serves goes on"]
    assert told(down, up) == ["the controller is back"]


def test_events_and_statuses_travel() -> None:
    status = seen(*BOTH, shortages=(SHORTAGE,))
    assert from_json(DeploymentStatus, to_json(status)) == status
    (event, *_) = events(None, status)
    assert (event.event, event.node, event.state) == ("node", "a", "there")
