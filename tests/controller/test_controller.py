"""The controller as a thread, on an imagined cluster: it goes on when the cluster cannot be seen, and leaves all be."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

from slipstream.placement.plan import Degrees, Role
from slipstream.runtime.controller.cluster import ClusterError
from slipstream.runtime.controller.controller import Controller, Status
from slipstream.runtime.reconcile.desired import Desired, PoolWish
from slipstream.runtime.reconcile.observed import Observed
from slipstream.runtime.reconcile.round import Policy
from slipstream.tests.fakes.first_fit import first_fit
from slipstream.tests.simulation.judge import Judge
from slipstream.tests.simulation.sequences import LIMITS
from slipstream.tests.simulation.world import World

PATIENCE_S = 20.0
DESIRED = Desired(
    pools=(PoolWish(name="p", role=Role.MIXED, degrees=Degrees(tp=2), replicas=2),),
    partial=True,
)


class Moving(World):
    """A world in which a second passes with every look, and which can be hidden."""

    hidden = False

    def observe(self) -> Observed:
        if self.hidden:
            raise ClusterError("nobody answers")
        self.pass_time(1.0)
        return super().observe()


def moving(devices: int) -> tuple[Moving, Controller]:
    judge = Judge(limits=LIMITS, desired=DESIRED)
    world = Moving(draw=random.Random(1), judge=judge)
    world.add_node("a", devices=devices, device_type="small", rack="a", taken=frozenset())
    policy = Policy(assign=first_fit, limits=LIMITS)
    return world, Controller(world, policy, clock=lambda: world.now_s, period_s=0.001)


def until(controller: Controller, check: Callable[[Status], bool]) -> Status:
    never, pause_s = threading.Event(), 0.005
    for _ in range(int(PATIENCE_S / pause_s)):
        if check(status := controller.status()):
            return status
        never.wait(pause_s)
    raise AssertionError(f"it does not become so: {controller.status()}")


def test_nothing_is_decided_before_something_is_wanted() -> None:
    world, controller = moving(4)
    controller.start()
    controller.close(timeout_s=PATIENCE_S)
    assert controller.status() == Status() and not world.processes and world.view.epoch == 0


def test_what_is_wanted_comes_up_and_stays_when_the_controller_ends() -> None:
    world, controller = moving(3)
    controller.want(DESIRED)
    controller.start()
    up = until(controller, lambda seen: [each.routed for each in seen.replicas] == [True])
    assert up.replicas[0].devices == ("a/0", "a/1") and up.replicas[0].phase == "ready"
    assert up.nodes[0].devices == 3 and [shortage.needed for shortage in up.shortages] == [2]
    world.hidden = True
    until(controller, lambda seen: seen.problem == "nobody answers")
    world.hidden = False
    until(controller, lambda seen: [each.routed for each in seen.replicas] == [True])
    controller.close(timeout_s=PATIENCE_S)
    assert len(world.processes) == 2 and len(world.view.replicas) == 1
