"""One round's work sheet: what was found, and what the deciders have decided so far.

Deciders read replicas and their phases here, and write through ``stop``, ``drain``, ``start`` and ``lack``. What one of
them decides the next ones see: a replica that is to stop has that phase at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ...placement.plan import Constraint, Degrees, ReplicaPlace, Shortage
from ...placement.topology import DeviceRef, Topology
from .actions import Action, StartGang, StopRank, Unroute
from .adopt import Phase, Replica, adopt
from .desired import Desired, Limits, PoolWish
from .memory import Backoff, Life, Memory
from .observed import Observed, ReplicaId, ReplicaSpec


class Assign(Protocol):
    """Finds devices for one replica of a pool among those that are free, or says what is missing.

    ``others``: where the pool's other replicas are. More free devices never turn a place into a shortage.
    """

    def __call__(
        self,
        topology: Topology,
        free: Collection[DeviceRef],
        degrees: Degrees,
        constraint: Constraint,
        *,
        pool: str = "",
        others: Sequence[ReplicaPlace] = (),
    ) -> ReplicaPlace | Shortage: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What decisions depend on besides facts: how replicas are placed, how long is waited."""

    assign: Assign
    limits: Limits


class Round:
    """The facts of one round and the decisions made in it."""

    def __init__(self, desired: Desired, observed: Observed, memory: Memory, policy: Policy, *, now_s: float) -> None:
        self.desired = desired
        self.observed = observed
        self.policy = policy
        self.now_s = now_s
        self.before = memory
        self.replicas = adopt(observed, memory, now_s=now_s)
        self.shortages: list[Shortage] = []
        self._phases: dict[ReplicaId, Phase] = {replica.id: replica.phase for replica in self.replicas}
        self._lives: dict[ReplicaId, Life] = {replica.id: replica.life for replica in self.replicas}
        self._backoffs: dict[str, Backoff] = {
            name: backoff
            for name, backoff in memory.backoffs.items()
            if (pool := desired.pool(name)) is not None and pool.generation == backoff.generation
        }
        self._unroutes: list[Unroute] = []
        self._stops: list[StopRank] = []
        self._starts: list[StartGang] = []

    def phase(self, replica: Replica) -> Phase:
        """Return a replica's phase, with what this round has decided."""
        return self._phases[replica.id]

    def life(self, replica: Replica) -> Life:
        """Return what is noted about a replica."""
        return self._lives[replica.id]

    def among(self, *phases: Phase) -> Iterator[Replica]:
        """Yield the replicas that are in one of these phases now."""
        for replica in self.replicas:
            if self._phases[replica.id] in phases:
                yield replica

    def current(self, pool: PoolWish, *phases: Phase) -> list[Replica]:
        """Return a pool's replicas that are as wanted and may stay where they are, in these phases."""
        return [
            replica
            for replica in self.among(*phases)
            if replica.id.pool == pool.name and not self.is_outdated(replica, pool)
        ]

    def is_outdated(self, replica: Replica, pool: PoolWish) -> bool:
        """Whether another replica is to take a replica's place: it is of another generation, or is to go."""
        return replica.spec.generation != pool.generation or self.is_to_go(replica)

    def open_devices(self) -> frozenset[DeviceRef]:
        """Return the devices on which something may start: all but those on cordoned nodes."""
        cordoned = self.desired.cordoned
        return frozenset(device for device in self.observed.topology.devices() if device.node not in cordoned)

    def is_to_go(self, replica: Replica) -> bool:
        """Whether an operator wants a replica away from where it is."""
        return self.is_leaving(replica) or bool(self.cordoned_nodes(replica))

    def is_leaving(self, replica: Replica) -> bool:
        """Whether an operator has named a replica, which then ends whatever becomes of its pool."""
        return str(replica.id) in self.desired.leaving

    def cordoned_nodes(self, replica: Replica) -> list[str]:
        """Return the cordoned nodes that a replica is on."""
        return sorted({seen.device.node for seen in replica.ranks} & self.desired.cordoned)

    def stop(self, replica: Replica, why: str) -> None:
        """End a replica: its driver first, which lets gateways know at once, then the others."""
        nodes = {node.name for node in self.observed.topology.nodes}
        # Nobody can be told on a node that is not there. Its ranks are judged anew when they are seen again.
        told = [seen for seen in replica.ranks if seen.device.node in nodes]
        self._stops += [StopRank(replica=replica.id, rank=seen.rank, why=why) for seen in told]
        if told:
            self._lives[replica.id] = replace(self._lives[replica.id], stopping=True)
        if self._phases[replica.id] is not Phase.BROKEN:
            self._phases[replica.id] = Phase.STOPPING

    def drain(self, replica: Replica, why: str) -> None:
        """Let a replica take no more requests, and note since when."""
        life = self._lives[replica.id]
        if life.drain_s is None:
            self._lives[replica.id] = replace(life, drain_s=self.now_s)
        self._phases[replica.id] = Phase.DRAINING
        self._unroutes.append(Unroute(replica=replica.id, why=why))

    def drains_since(self, replica: Replica) -> float:
        """Return since when a replica drains, noting it if somebody else began."""
        life = self._lives[replica.id]
        if life.drain_s is None:
            self._lives[replica.id] = replace(life, drain_s=self.now_s)
            return self.now_s
        return life.drain_s

    def start(self, pool: PoolWish, place: ReplicaPlace) -> None:
        """Start a replica under the next incarnation."""
        incarnation = self.observed.incarnation + len(self._starts) + 1
        id = ReplicaId(pool=pool.name, incarnation=incarnation)
        spec = ReplicaSpec(id=id, role=pool.role, generation=pool.generation, degrees=pool.degrees)
        self._starts.append(StartGang(spec=spec, devices=place.devices))
        self._lives[id] = Life(
            born_s=self.now_s,
            nodes=frozenset(device.node for device in place.devices),
            generation=pool.generation,
        )

    def backs_off(self, pool: PoolWish) -> bool:
        """Whether a pool waits before it starts another replica."""
        backoff = self._backoffs.get(pool.name)
        return backoff is not None and self.now_s < backoff.until_s(self.policy.limits)

    def note_failure(self, pool: str, life: Life) -> None:
        """Count a replica that failed by itself; one that lived long counts for nothing."""
        wish = self.desired.pool(pool)
        if wish is None or wish.generation != life.generation:
            return
        if life.up_s is not None and self.now_s - life.up_s >= self.policy.limits.stable_s:
            return
        before = self._backoffs.get(pool)
        failures = before.failures + 1 if before is not None else 1
        self._backoffs[pool] = Backoff(generation=wish.generation, failures=failures, last_s=self.now_s)

    def forget_failures(self, pool: str) -> None:
        """A pool has shown that its replicas can live."""
        self._backoffs.pop(pool, None)

    def actions(self) -> tuple[Action, ...]:
        """Return what was decided: requests are kept off a replica before it ends."""
        return (*self._unroutes, *self._stops, *self._starts)

    def memory(self) -> Memory:
        """Return what the next round has to know."""
        return Memory(lives=self._lives, backoffs=self._backoffs)
