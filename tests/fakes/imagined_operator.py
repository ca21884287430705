"""An ``Operator`` over an imagined cluster: the controller that runs is the real one, a round with every look at it.

A second passes with every look and every pause, so that nothing is waited for.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from slipstream.placement.topology import DeviceType, Link, Topology
from slipstream.runtime.controller.cluster import ClusterError, StaleController
from slipstream.runtime.controller.controller import Controller
from slipstream.runtime.controller.gateway_keeper import GatewayOrder, GatewayReport, GatewayState
from slipstream.runtime.controller.ledger import Deployment, Gang, Ledger
from slipstream.runtime.controller.operator import ControllerSeen, Remains
from slipstream.runtime.controller.process_log import LogPage, ProcessLog
from slipstream.runtime.operations.follow import Patience
from slipstream.runtime.reconcile.actions import StartGang
from slipstream.runtime.reconcile.observed import Observed
from slipstream.runtime.reconcile.round import Policy
from slipstream.runtime.reconcile.views import View
from slipstream.tests.fakes.first_fit import first_fit
from slipstream.tests.fakes.memory_store import MemoryStore
from slipstream.tests.simulation.judge import Judge
from slipstream.tests.simulation.world import World

HEAD = "10.0.0.1"


class LedgerWorld(World):
    """A world whose platform keeps a ledger, as a real one does."""

    ledger: Ledger

    def start(self, gang: StartGang) -> None:
        super().start(gang)
        self.ledger.claim_gang(Gang(spec=gang.spec, devices=gang.devices, numbers=("",) * len(gang.devices)))

    def publish(self, view: View) -> None:
        super().publish(view)
        self.ledger.claim_view(view)

    def observe(self) -> Observed:
        self.pass_time(1.0)
        observed = super().observe()
        listed = {rank.spec.id for rank in observed.ranks}
        for gang in self.ledger.gangs().values():
            if gang.spec.id not in listed:
                self.ledger.keep_gang(replace(gang, gone=True))
        return observed


class ImaginedOperator:
    """A platform with two nodes, ``a`` and ``b``, of two devices each, for the deployment ``chat``."""

    def __init__(self, *, nodes: int = 2) -> None:
        self.address, self.own = "imagined:6379", False
        self.store = MemoryStore()
        self.judge = Judge(limits=Deployment().limits)
        self.world = LedgerWorld(draw=random.Random(7), judge=self.judge)
        self.world.ledger = Ledger(self.store, deployment="chat")
        for index in range(nodes):
            self.world.add_node("ab"[index], devices=2, device_type="small", rack="r", taken=frozenset())
        self.running: Controller | None = None
        self.orders: dict[str, GatewayOrder] = {}
        self.logs: dict[str, ProcessLog] = {}
        self.silent = False
        self.drained_gateways: list[tuple[str, float]] = []

    @contextmanager
    def reach(self, address: str | None, **_: object) -> Iterator[ImaginedOperator]:
        """Stand in for the way to a real platform."""
        yield self

    def patience(self) -> Patience:
        """Time as this world has it."""
        return Patience(clock=lambda: self.world.now_s, pause=self.world.pass_time, period_s=1.0)

    def kill_controller(self) -> None:
        """The controller's process ends."""
        self.running = None
        self.judge.forgets()

    def topology(self, device_types: Mapping[str, DeviceType], network: Link, device_link: Link) -> Topology:
        return self.world.topology()

    def watch_address(self, port: int) -> str:
        return f"{HEAD}:{port or 23456}"

    def controller(self, name: str) -> ControllerSeen:
        if self.silent:
            raise ClusterError("nobody answers")
        if self.running is None:
            return ControllerSeen(detail="no controller runs")
        self.running.run_round()
        return ControllerSeen(alive=True, status=self.running.status())

    def start_controller(self, name: str, deployment: Deployment) -> None:
        if self.running is None:
            policy = Policy(assign=first_fit, limits=deployment.limits)
            self.running = Controller(self.world, policy, clock=lambda: self.world.now_s, period_s=1.0)
            self.running.want(self.world.ledger.deployment().desired, deployment.limits)

    def want(self, name: str, deployment: Deployment) -> None:
        if self.running is None:
            raise ClusterError("no controller runs")
        if not self.world.ledger.keep_deployment(deployment):
            raise StaleController("somebody else wrote")
        self.judge.desired, self.judge.limits = deployment.desired, deployment.limits
        self.running.want(deployment.desired, deployment.limits)

    def end_controller(self, name: str) -> None:
        self.running = None

    def gateways(self, name: str, orders: tuple[GatewayOrder, ...]) -> tuple[GatewayReport, ...]:
        return tuple(
            GatewayReport(name=order.name, node=order.node, state=GatewayState.READY, address=f"{HEAD}:{order.port}")
            if self.orders.get(order.name) == order
            else GatewayReport(name=order.name, node=order.node, detail="nobody keeps it")
            for order in orders
        )

    def start_gateway(self, name: str, order: GatewayOrder) -> None:
        self.orders[order.name] = order

    def end_gateway(self, name: str, gateway: str, *, drain_s: float) -> None:
        if self.orders.pop(gateway, None) is not None:
            self.drained_gateways.append((gateway, drain_s))

    def log(self, name: str, source: str, begin: int) -> LogPage | None:
        return self.logs[source].page(begin) if source in self.logs else None

    def remains(self, name: str, mark: str) -> Remains:
        actors = [f"rank/{id}/{rank}" for id, rank in self.world.processes]
        actors += ["controller"] * (self.running is not None) + [f"gateway/{order}" for order in self.orders]
        return Remains(actors=tuple(actors))

    def end_all(self, name: str, mark: str) -> None:
        self.world.processes.clear()
        self.world.drivers.clear()
        self.orders.clear()
        self.running = None

    def close(self) -> None:
        pass
