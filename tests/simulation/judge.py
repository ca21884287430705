"""What must hold at every action, whatever happened before. Knows what was seen and what is asked for, and no decider.

gangs    under an incarnation of their own, whole, on free devices that the pool may use, on no cordoned node; not more
         than is asked for
stops    only of what is broken, never served, or has drained
drains   only of what is too many, old, or to go; of what is to go only when another serves in its place, or when there
         is no room for one, and the last of a pool only if it was named
views    numbered upwards, naming replicas that are ready
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from slipstream.placement.plan import ReplicaPlace
from slipstream.placement.topology import DeviceRef
from slipstream.runtime.reconcile.actions import StartGang, StopRank, Unroute
from slipstream.runtime.reconcile.desired import Desired, Limits
from slipstream.runtime.reconcile.observed import DriverSeen, Observed, RankSeen, RankState, ReplicaId
from slipstream.runtime.reconcile.round import Assign
from slipstream.runtime.reconcile.views import View
from slipstream.tests.fakes.first_fit import allows, first_fit


class Violation(AssertionError):
    """Something happened that must never happen."""


class _Left(Protocol):
    """What a driver still has to end, in truth or as it was seen."""

    @property
    def admitting(self) -> bool: ...
    @property
    def requests(self) -> int: ...
    @property
    def grants(self) -> int: ...
    @property
    def transfers(self) -> int: ...


@dataclass(slots=True)
class Judge:
    """Judges actions against what was seen when they were decided. Units: drains_s, when each drain began"""

    limits: Limits
    assign: Assign = first_fit
    desired: Desired = field(default_factory=Desired)
    seen: Observed | None = None
    now_s: float = 0.0
    ranks: dict[ReplicaId, list[RankSeen]] = field(default_factory=dict)
    seen_drivers: dict[ReplicaId, DriverSeen] = field(default_factory=dict)
    first_seen_s: dict[ReplicaId, float] = field(default_factory=dict)
    drains_s: dict[ReplicaId, float] = field(default_factory=dict)
    ended: set[ReplicaId] = field(default_factory=set)
    published: set[str] = field(default_factory=set)
    served_at_sight: set[str] = field(default_factory=set)
    epoch: int = 0
    new_controller: bool = False
    used: set[int] = field(default_factory=set)
    started: dict[str, int] = field(default_factory=dict)
    drained_to_the_end: int = 0
    cut_short: int = 0

    def saw(self, observed: Observed, *, now_s: float) -> None:
        """Note what a round starts from."""
        self.seen, self.now_s = observed, now_s
        self.served_at_sight = {replica.replica for replica in observed.view.replicas}
        self.ranks = {}
        for rank in observed.ranks:
            self.ranks.setdefault(rank.spec.id, []).append(rank)
            self.first_seen_s.setdefault(rank.spec.id, now_s)
        self.seen_drivers = {driver.replica: driver for driver in observed.drivers}
        # What is not listed any more may come back from behind a cut, without having heard that it was to end.
        self.ended &= self.ranks.keys()
        if self.new_controller:
            # It knows of the drains that drivers have heard of.
            self.new_controller = False
            heard = {id for id, driver in self.seen_drivers.items() if not driver.admitting}
            self.drains_s = {id: since_s for id, since_s in self.drains_s.items() if id in heard}
        for id, driver in self.seen_drivers.items():
            # A driver may have been out of sight when this controller began.
            if not driver.admitting:
                self.drains_s.setdefault(id, now_s)
        self.started = {}

    def forgets(self) -> None:
        """A controller that starts again does not know what it told to end, and has to judge by what it sees."""
        self.ended.clear()
        self.new_controller = True

    def starts(self, gang: StartGang, *, taken: set[DeviceRef]) -> None:
        """A replica is started on devices of which some are taken."""
        assert self.seen is not None
        id, pool = gang.spec.id, self.desired.pool(gang.spec.id.pool)
        _hold(pool is not None, f"{id} is started for a pool that is not wanted")
        assert pool is not None
        _hold(id.incarnation not in self.used, f"incarnation {id.incarnation} has two owners")
        self.used.add(id.incarnation)
        self.first_seen_s[id] = self.now_s
        devices = set(gang.devices)
        _hold(not devices & taken, f"{id}: two ranks on {devices & taken}")
        _hold(len(devices) == len(gang.devices) == pool.degrees.ranks, f"{id} is started with {len(devices)} ranks")
        _hold((gang.spec.generation, gang.spec.role) == (pool.generation, pool.role), f"{id} is not what is wanted")
        nodes = {node.name: node for node in self.seen.topology.nodes}
        for device in devices:
            node = nodes[device.node]
            _hold(device.index < node.devices and device.index not in node.taken, f"{device} cannot be had")
            _hold(allows(pool.constraint, node), f"{id} may not run on {device.node}")
            _hold(device.node not in self.desired.cordoned, f"{id} is started on {device.node}, which is cordoned")
        self.started[pool.name] = self.started.get(pool.name, 0) + 1
        living = self._living_current(pool.name)
        _hold(living + self.started[pool.name] <= pool.replicas, f"{id} is one more than {pool.replicas}")

    def stops(self, stop: StopRank, driver: _Left | None, *, now_s: float) -> None:
        """A rank is ended while its driver has so much left."""
        id = stop.replica
        if not self._whole(id) or id in self.ended:
            self.ended.add(id)
            return
        # A driver that has ended since then is judged by what was seen of it.
        driver = driver or self.seen_drivers.get(id)
        if driver is not None and not driver.admitting:
            left = driver.requests + driver.grants + driver.transfers
            if not left:
                self.drained_to_the_end += 1
                self.ended.add(id)
                return
        over = id in self.drains_s and now_s - self.drains_s[id] >= self.limits.drain_s
        life_s = now_s - self.first_seen_s[id]
        # A driver that nobody routes to any more and that does not answer either.
        unheard = id not in self.seen_drivers and not self._in_view(id) and life_s >= self.limits.loading_s
        served = str(id) in self.published
        _hold(not served or over or unheard, f"{id} serves and is stopped: {stop.why}")
        if over:
            self.cut_short += 1
        else:
            overdue = life_s >= min(self.limits.starting_s, self.limits.loading_s)
            _hold(overdue or self._too_many(id), f"{id} was coming up and is stopped: {stop.why}")
        self.ended.add(id)

    def unroutes(self, unroute: Unroute, *, now_s: float) -> None:
        """A replica is to take no more requests."""
        id = unroute.replica
        if id not in self.drains_s:
            _hold(self._too_many(id), f"{id} is needed and drained: {unroute.why}")
            self._gives_way(id)
            self.drains_s[id] = now_s
        _hold(self.seen is None or self._in_view(id) is False, f"{id} is unrouted while gateways are sent to it")

    def _gives_way(self, id: ReplicaId) -> None:
        """Hold the drain of a replica that is as wanted, but to go, against what its pool has left."""
        pool, ranks = self.desired.pool(id.pool), self.ranks.get(id)
        assert self.seen is not None
        if pool is None or not ranks or ranks[0].spec.generation != pool.generation or not self._is_to_go(id):
            return
        if str(id) not in self.served_at_sight:
            # Nobody was sent to it: nothing is taken from the pool.
            return
        serve = [each for each in self.seen.view.replicas if each.pool == id.pool]
        alike = [each for each in serve if each.generation.model == pool.generation.model]
        wanted = str(id) in self.desired.leaving
        _hold(bool(alike) or wanted or not pool.replicas, f"{id} goes, and nobody serves in its pool any more")
        # Of several pools, one may have been promised what another looks for.
        if len(self.desired.pools) == 1 and len(serve) < pool.replicas:
            used = {rank.device for rank in self.seen.ranks}
            free = frozenset(self.seen.topology.devices()) - used
            free = frozenset(device for device in free if device.node not in self.desired.cordoned)
            found = self.assign(self.seen.topology, free, pool.degrees, pool.constraint)
            coming = self._living_current(pool.name) >= pool.replicas
            _hold(
                not coming and not isinstance(found, ReplicaPlace),
                f"{id} goes before another has come, and there is room for one",
            )

    def publishes(self, view: View) -> None:
        """A view is published."""
        assert self.seen is not None
        _hold(view.epoch > self.epoch, f"epoch {view.epoch} comes after {self.epoch}")
        self.epoch = view.epoch
        names = [replica.replica for replica in view.replicas]
        _hold(len(set(names)) == len(names), f"a view names one twice: {names}")
        for name in names:
            id = ReplicaId.parse(name)
            ready = self._whole(id) and all(rank.state is RankState.READY for rank in self.ranks[id])
            driver = self.seen_drivers.get(id)
            named_before = self.seen.view.replica(name) is not None
            proven = named_before if driver is None else driver.proven and driver.admitting
            _hold(ready and proven, f"the view names {name}, which is not ready")
            _hold(id not in self.ended, f"the view names {name}, which was told to end")
            # A drain of which nobody remembers and its driver never heard has not begun.
            self.drains_s.pop(id, None)
        self.published.update(names)
        self.seen = Observed(
            topology=self.seen.topology,
            ranks=self.seen.ranks,
            drivers=self.seen.drivers,
            view=view,
            incarnation=self.seen.incarnation,
        )

    def _in_view(self, id: ReplicaId) -> bool:
        assert self.seen is not None
        return self.seen.view.replica(str(id)) is not None

    def _whole(self, id: ReplicaId) -> bool:
        """Whether all ranks of a replica were seen, and well."""
        assert self.seen is not None
        ranks = self.ranks.get(id, [])
        if not ranks or len(ranks) != ranks[0].spec.degrees.ranks:
            return False
        nodes = {node.name for node in self.seen.topology.nodes}
        bad = (RankState.FAILED, RankState.LOST)
        return all(rank.state not in bad and rank.device.node in nodes for rank in ranks)

    def _living_current(self, name: str) -> int:
        pool = self.desired.pool(name)
        assert pool is not None
        return sum(
            1
            for id, ranks in self.ranks.items()
            if id.pool == name
            and ranks[0].spec.generation == pool.generation
            and not self._is_to_go(id)
            and id not in self.ended
            and id not in self.drains_s
            and self._whole(id)
        )

    def _is_to_go(self, id: ReplicaId) -> bool:
        """Whether the operator wants it away from where it is."""
        nodes = {rank.device.node for rank in self.ranks.get(id, [])}
        return str(id) in self.desired.leaving or bool(nodes & self.desired.cordoned)

    def _too_many(self, id: ReplicaId) -> bool:
        pool = self.desired.pool(id.pool)
        if pool is None or not self.ranks.get(id):
            return True
        if self.ranks[id][0].spec.generation != pool.generation or self._is_to_go(id):
            return True
        return self._living_current(id.pool) > pool.replicas


def _hold(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Violation(otherwise)
