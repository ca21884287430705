"""A cluster that is only imagined: nodes, ranks, drivers and a gateway, with time as a number. A ``Cluster``.

Holds the truth, also of what nobody sees: ranks run on behind a cut link. Whatever is asked of it is judged by
``judge`` first; what must never happen raises ``Violation`` there.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum

from slipstream.placement.topology import DeviceRef, DeviceType, Link, Node, Topology
from slipstream.runtime.controller.cluster import ClusterError, StaleController, StartRefused
from slipstream.runtime.reconcile.actions import StartGang, StopRank, Unroute
from slipstream.runtime.reconcile.observed import DriverSeen, Observed, RankSeen, RankState, ReplicaId, ReplicaSpec
from slipstream.runtime.reconcile.views import View
from slipstream.tests.simulation.judge import Judge

DEVICE_TYPES = {
    name: DeviceType(name=name, memory_bytes=1 << 30, flops={}, memory_bytes_per_s=1e9) for name in ("small", "large")
}
_LINK = Link(bytes_per_s=1e9, latency_s=1e-4)


class ControllerDied(Exception):
    """The controller's process ends in the middle of its actions."""


class Fate(Enum):
    """What becomes of a rank that is started."""

    WELL = "well"
    SLOW = "slow"
    FAILS = "fails"
    DIES_LOADING = "dies while loading"


@dataclass(slots=True)
class SimNode:
    """A machine. ``linked``: whether the controller can see it; its ranks run anyway."""

    node: Node
    up: bool = True
    linked: bool = True

    @property
    def seen(self) -> bool:
        return self.up and self.linked


@dataclass(slots=True)
class Process:
    """One rank. Units: up_s, ready_s, ends_s, moments"""

    spec: ReplicaSpec
    rank: int
    device: DeviceRef
    up_s: float
    ready_s: float
    fate: Fate
    state: RankState = RankState.STARTING
    detail: str = ""
    ends_s: float | None = None


@dataclass(slots=True)
class Driver:
    """What rank 0 says of its replica. ``stuck``: its requests do not end by themselves."""

    address: str
    proven: bool = False
    admitting: bool = True
    requests: int = 0
    grants: int = 0
    transfers: int = 0
    stuck: bool = False
    silent: bool = False


@dataclass(slots=True)
class World:
    """The truth about one cluster."""

    draw: random.Random
    judge: Judge
    nodes: dict[str, SimNode] = field(default_factory=dict)
    processes: dict[tuple[ReplicaId, int], Process] = field(default_factory=dict)
    drivers: dict[ReplicaId, Driver] = field(default_factory=dict)
    now_s: float = 0.0
    view: View = field(default_factory=View)
    incarnation: int = 0
    gateway_view: View = field(default_factory=View)
    fates: list[Fate] = field(default_factory=list)
    names_lost: bool = False
    failing_pools: frozenset[str] = frozenset()
    dies_after: int | None = None
    meanwhile: Callable[[], None] | None = None
    refusals: int = 0
    sizes: dict[ReplicaId, int] = field(default_factory=dict)

    # ------------------------------------------------------------------ as a Cluster

    def observe(self) -> Observed:
        """Return what can be seen."""
        seen_nodes = {name for name, node in self.nodes.items() if node.seen}
        ranks = []
        for process in self.processes.values():
            state = process.state
            if process.device.node not in seen_nodes:
                if not self.names_lost:
                    continue
                state = RankState.LOST
            ranks.append(
                RankSeen(
                    spec=process.spec,
                    rank=process.rank,
                    device=process.device,
                    state=state,
                    detail=process.detail,
                )
            )
        drivers = [
            DriverSeen(
                replica=id,
                address=driver.address,
                proven=driver.proven,
                admitting=driver.admitting,
                requests=driver.requests,
                grants=driver.grants,
                transfers=driver.transfers,
            )
            for id, driver in self.drivers.items()
            if not driver.silent and self.processes[id, 0].device.node in seen_nodes
        ]
        observed = Observed(
            topology=self.topology(),
            ranks=tuple(ranks),
            drivers=tuple(drivers),
            view=self.view,
            incarnation=self.incarnation,
        )
        self.judge.saw(observed, now_s=self.now_s)
        if self.meanwhile is not None:
            self.meanwhile()
        return observed

    def start(self, gang: StartGang) -> None:
        """Start all ranks of a replica, or none."""
        self._count_action()
        if gang.spec.id.incarnation <= self.incarnation:
            raise StaleController(f"incarnation {gang.spec.id.incarnation} was claimed before")
        self.incarnation = gang.spec.id.incarnation
        if self.refusals:
            self.refusals -= 1
            raise StartRefused("the platform says no")
        if not all(device.node in self.nodes and self.nodes[device.node].seen for device in gang.devices):
            raise StartRefused("a node is gone")
        self.judge.starts(gang, taken={process.device for process in self.processes.values()})
        self.sizes[gang.spec.id] = len(gang.devices)
        fate = self.fates.pop() if self.fates else Fate.WELL
        if gang.spec.id.pool in self.failing_pools:
            fate = Fate.DIES_LOADING
        unlucky = self.draw.randrange(len(gang.devices))
        slow = 1000.0 if fate is Fate.SLOW else 0.0
        for rank, device in enumerate(gang.devices):
            up_s = self.now_s + self.draw.uniform(0.5, 6.0) + slow * (self.draw.random() < 0.5)
            self.processes[gang.spec.id, rank] = Process(
                spec=gang.spec,
                rank=rank,
                device=device,
                up_s=up_s,
                ready_s=up_s + self.draw.uniform(0.5, 15.0) + slow,
                fate=fate if rank == unlucky or fate is Fate.SLOW else Fate.WELL,
            )

    def stop(self, stop: StopRank) -> None:
        """End one rank, a little later."""
        self._count_action()
        process = self.processes.get((stop.replica, stop.rank))
        if process is None:
            return
        self.judge.stops(stop, self.drivers.get(stop.replica), now_s=self.now_s)
        if not self.nodes[process.device.node].seen:
            raise ClusterError("its node cannot be reached")
        if process.ends_s is None:
            process.ends_s = self.now_s + self.draw.choice((0.0, 0.0, 2.0, 12.0))

    def unroute(self, unroute: Unroute) -> None:
        """Let a driver admit nothing more."""
        self._count_action()
        self.judge.unroutes(unroute, now_s=self.now_s)
        driver = self.drivers.get(unroute.replica)
        if driver is None or driver.silent or not self.nodes[self.processes[unroute.replica, 0].device.node].seen:
            raise ClusterError("its driver does not answer")
        driver.admitting = False

    def publish(self, view: View) -> None:
        """Keep a view; the gateway has it when it comes to it."""
        self._count_action()
        self.judge.publishes(view)
        if view.epoch <= self.view.epoch:
            raise StaleController(f"epoch {view.epoch} was published before")
        self.view = view

    def _count_action(self) -> None:
        if self.dies_after is not None:
            self.dies_after -= 1
            if self.dies_after < 0:
                self.dies_after = None
                raise ControllerDied

    # ------------------------------------------------------------------ as the world

    def topology(self) -> Topology:
        """Return the nodes that can be seen."""
        nodes = tuple(node.node for node in self.nodes.values() if node.seen)
        return Topology(nodes=nodes, device_types=DEVICE_TYPES, network=_LINK)

    def add_node(self, name: str, *, devices: int, device_type: str, rack: str, taken: frozenset[int]) -> None:
        """Let a node join."""
        self.nodes[name] = SimNode(
            node=Node(
                name=name,
                address=f"10.0.0.{len(self.nodes) + 1}",
                device_type=device_type,
                devices=devices,
                device_link=_LINK,
                labels={"rack": rack},
                taken=taken,
            )
        )

    def lose_node(self, name: str) -> None:
        """A node ends, and all on it."""
        self.nodes[name].up = False
        for key in [key for key, process in self.processes.items() if process.device.node == name]:
            self._remove(key)

    def end_process(self, key: tuple[ReplicaId, int], *, listed: bool) -> None:
        """A rank's process ends by itself; the platform lists it as failed, or lists it no more."""
        if listed:
            self._fail(self.processes[key], "killed")
        else:
            self._remove(key)

    def pass_time(self, seconds: float) -> None:
        """Let processes come up and end, and requests come to their end."""
        self.now_s += seconds
        for key, process in list(self.processes.items()):
            if process.ends_s is not None and process.ends_s <= self.now_s:
                self._remove(key)
                continue
            if process.ends_s is not None:
                continue
            if process.state is RankState.STARTING and process.up_s <= self.now_s:
                self._comes_up(process)
            if process.state is RankState.LOADING and process.ready_s <= self.now_s:
                self._loads(process)
        self._drivers_work()

    def request(self, name: str, count: int) -> bool:
        """Send requests to a replica as a gateway would; return whether it took them."""
        id = ReplicaId.parse(name)
        driver = self.drivers.get(id)
        if driver is None or not driver.admitting or not driver.proven:
            return False
        kind = self.draw.choice(("requests", "requests", "grants", "transfers"))
        setattr(driver, kind, getattr(driver, kind) + count)
        return True

    def settles(self) -> None:
        """Nothing goes wrong any more."""
        self.fates.clear()
        self.refusals = 0
        self.dies_after = None
        self.gateway_view = self.view
        for driver in self.drivers.values():
            driver.silent = False

    @property
    def busy(self) -> bool:
        """Whether something is going to change by itself."""
        return any(
            process.ends_s is not None
            or process.state in (RankState.STARTING, RankState.LOADING)
            or (process.rank == 0 and process.spec.id in self.drivers and not self.drivers[process.spec.id].admitting)
            for process in self.processes.values()
            if self.nodes[process.device.node].seen
        )

    def _comes_up(self, process: Process) -> None:
        if process.fate is Fate.FAILS:
            self._fail(process, "could not be started")
            return
        process.state = RankState.LOADING
        if process.rank == 0:
            device = process.device
            address = f"{self.nodes[device.node].node.address}:{5000 + process.spec.id.incarnation}"
            self.drivers[process.spec.id] = Driver(address=address)

    def _loads(self, process: Process) -> None:
        if process.fate is Fate.DIES_LOADING:
            self._fail(process, "the checkpoint is cut short")
            return
        id = process.spec.id
        ranks = [self.processes.get((id, rank)) for rank in range(self.sizes[id])]
        # The ranks of a replica meet before any of them is ready.
        if all(rank is not None and rank.state in (RankState.LOADING, RankState.READY) for rank in ranks):
            process.state = RankState.READY

    def _drivers_work(self) -> None:
        for id, driver in self.drivers.items():
            if not driver.proven:
                ranks = [self.processes.get((id, rank)) for rank in range(self.sizes[id])]
                driver.proven = all(
                    rank is not None and rank.state is RankState.READY and rank.ends_s is None for rank in ranks
                )
            elif not driver.stuck and (driver.requests or driver.grants or driver.transfers):
                driver.requests -= self.draw.randint(0, driver.requests)
                driver.grants = 0 if self.draw.random() < 0.5 else driver.grants
                driver.transfers = 0 if self.draw.random() < 0.5 else driver.transfers

    def _fail(self, process: Process, detail: str) -> None:
        process.state = RankState.FAILED
        process.detail = detail
        if process.rank == 0:
            self.drivers.pop(process.spec.id, None)

    def _remove(self, key: tuple[ReplicaId, int]) -> None:
        del self.processes[key]
        if key[1] == 0:
            self.drivers.pop(key[0], None)

    def relabel(self, name: str, rack: str) -> None:
        """A node comes back elsewhere."""
        sim = self.nodes[name]
        sim.node = replace(sim.node, labels={"rack": rack})
