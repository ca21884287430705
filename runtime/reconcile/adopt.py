"""From ranks to replicas: what lives, whoever started it.

A replica is all its ranks. Which there are, and in which phase each is, is read from what is seen, every round; so a
controller that starts again takes over what runs without touching it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from enum import StrEnum

from ...placement.plan import ReplicaPlace
from ...placement.topology import DeviceRef
from .memory import Life, Memory
from .observed import DriverSeen, Observed, RankSeen, RankState, ReplicaId, ReplicaSpec


class Phase(StrEnum):
    """Where a replica is in its life."""

    STARTING = "starting"  # not all its processes are up
    LOADING = "loading"  # up; no token has come out of it yet
    SILENT = "silent"  # its ranks are ready and its driver does not answer: it may have requests
    READY = "ready"
    DRAINING = "draining"  # takes no more requests
    BROKEN = "broken"  # a rank is gone, and with it the replica
    STOPPING = "stopping"  # was told to end


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """A replica as it is seen.

    ``why``: what broke it. ``own_fault``: whether that is the replica's doing and not its node's.
    """

    spec: ReplicaSpec
    ranks: tuple[RankSeen, ...]
    driver: DriverSeen | None
    life: Life
    phase: Phase
    why: str = ""
    own_fault: bool = False

    @property
    def id(self) -> ReplicaId:
        """Its name, once and for all."""
        return self.spec.id

    @property
    def place(self) -> ReplicaPlace:
        """Where its ranks are, in their order."""
        return ReplicaPlace(devices=tuple(rank.device for rank in self.ranks))

    @property
    def devices(self) -> frozenset[DeviceRef]:
        """What it holds as long as its ranks are listed."""
        return frozenset(rank.device for rank in self.ranks)


def adopt(observed: Observed, memory: Memory, *, now_s: float) -> tuple[Replica, ...]:
    """Return the replicas that are there, in the order of their incarnations."""
    ranks: dict[ReplicaId, list[RankSeen]] = defaultdict(list)
    for seen in observed.ranks:
        ranks[seen.spec.id].append(seen)
    drivers = {driver.replica: driver for driver in observed.drivers}
    routed = {replica.replica for replica in observed.view.replicas}
    nodes = frozenset(node.name for node in observed.topology.nodes)
    found = []
    for id in sorted(ranks, key=lambda id: id.incarnation):
        of_replica = tuple(sorted(ranks[id], key=lambda seen: seen.rank))
        spec = of_replica[0].spec
        life = memory.lives.get(id) or Life(
            born_s=now_s, nodes=frozenset(seen.device.node for seen in of_replica), generation=spec.generation
        )
        driver = drivers.get(id)
        why, own_fault = _broken(of_replica, life, nodes)
        phase = Phase.BROKEN if why else _phase(of_replica, life, driver, routed=str(id) in routed)
        if phase in (Phase.LOADING, Phase.SILENT, Phase.READY) and life.up_s is None:
            life = replace(life, up_s=now_s)
        found.append(
            Replica(spec=spec, ranks=of_replica, driver=driver, life=life, phase=phase, why=why, own_fault=own_fault)
        )
    return tuple(found)


def _phase(ranks: tuple[RankSeen, ...], life: Life, driver: DriverSeen | None, *, routed: bool) -> Phase:
    if life.stopping:
        return Phase.STOPPING
    if life.drain_s is not None or (driver is not None and not driver.admitting):
        return Phase.DRAINING
    states = {seen.state for seen in ranks}
    if RankState.STARTING in states:
        return Phase.STARTING
    if RankState.LOADING in states:
        return Phase.LOADING
    if driver is None:
        # A driver that answered before may miss a round: nothing is decided on not knowing.
        return Phase.READY if routed else Phase.SILENT
    return Phase.READY if driver.proven else Phase.LOADING


def _broken(ranks: tuple[RankSeen, ...], life: Life, nodes: frozenset[str]) -> tuple[str, bool]:
    """Return why a replica cannot go on, "" if it can, and whether that is its own fault."""
    for seen in ranks:
        if seen.state is RankState.LOST or seen.device.node not in nodes:
            return f"rank {seen.rank}: node {seen.device.node} cannot be seen", False
    for seen in ranks:
        if seen.state is RankState.FAILED:
            return f"rank {seen.rank} failed: {seen.detail or 'its process has ended'}", True
    numbers = {seen.rank for seen in ranks}
    missing = [rank for rank in range(ranks[0].spec.degrees.ranks) if rank not in numbers]
    if missing:
        # A node that went takes its ranks along.
        return f"rank {', '.join(map(str, missing))} is gone", life.nodes <= nodes
    return "", False
