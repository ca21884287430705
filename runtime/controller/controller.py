"""The controller as it runs: rounds on a thread of its own, one after the other, until it is closed.

Owns the pace and what is said of the last round. A round that fails is tried again; what serves goes on meanwhile.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ...placement.plan import Degrees, Shortage
from ..clock import Clock
from ..reconcile.adopt import Phase, Replica, adopt
from ..reconcile.desired import Desired, Limits, PoolWish
from ..reconcile.round import Policy
from ..reconcile.surplus import COMING
from ..reconcile.views import View
from .cluster import Cluster, ClusterError
from .rounds import RoundReport, Rounds

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStatus:
    """One rank, for people. ``loaded``: the share of its weights that it has read."""

    rank: int
    device: str
    state: str
    loaded: float = 0.0
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """One replica, for people.

    ``routed``: whether gateways send it requests; ``requests``: how many it works on; ``transfers``: how many prompts
    it sends or receives.
    """

    replica: str
    pool: str
    generation: str
    phase: str
    routed: bool
    devices: tuple[str, ...]
    address: str
    why: str
    requests: int = 0
    ranks: tuple[RankStatus, ...] = ()
    role: str = ""
    degrees: Degrees = field(default_factory=Degrees)
    transfers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatus:
    """One pool, for people.

    ``serving``: replicas of the generation that is wanted, to which gateways send requests. ``coming`` and ``leaving``:
    those on their way in, and all others. ``failures``: starts that failed since the last one that lasted.
    """

    pool: str
    role: str
    degrees: Degrees
    generation: str
    wanted: int
    serving: int = 0
    coming: int = 0
    leaving: int = 0
    failures: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """One node, for people."""

    name: str
    address: str
    device_type: str
    devices: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How a deployment is, as the last round saw it that saw anything.

    ``problem``: why the last round did not do all. ``rounds``: how many this controller has run.
    """

    rounds: int = 0
    epoch: int = 0
    pools: tuple[PoolStatus, ...] = ()
    cordoned: tuple[str, ...] = ()
    leaving: tuple[str, ...] = ()
    nodes: tuple[NodeStatus, ...] = ()
    replicas: tuple[ReplicaStatus, ...] = ()
    shortages: tuple[Shortage, ...] = ()
    problem: str = ""


class Controller:
    """Runs rounds against a cluster. Units: period_s, from the end of a round to the next"""

    def __init__(self, cluster: Cluster, policy: Policy, *, clock: Clock, period_s: float) -> None:
        self._rounds = Rounds(cluster, policy, Desired(), clock=clock)
        self._clock = clock
        self._period_s = period_s
        self._changed = threading.Condition()
        self._wanted: Desired | None = None
        self._limits = policy.limits
        self._news = False
        self._closing = False
        self._status = Status()
        self._count = 0
        self._thread = threading.Thread(target=self._run, name="slipstream-controller", daemon=True)

    def want(self, desired: Desired, limits: Limits | None = None) -> None:
        """Set what is wanted from now on, and how patient to be; until something is, nothing is decided."""
        with self._changed:
            self._wanted = desired
            self._limits = limits or self._limits
            self._news = True
            self._changed.notify()

    def start(self) -> None:
        """Begin with the rounds."""
        self._thread.start()

    def status(self) -> Status:
        """Return what the last round saw."""
        return self._status

    def close(self, *, timeout_s: float) -> None:
        """End after the round that runs; what serves is left alone."""
        with self._changed:
            self._closing = self._news = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def run_round(self) -> None:
        """Run one round; what came of it is the status. Until something is wanted there is none."""
        with self._changed:
            if self._wanted is None:
                return
            self._rounds.desired = self._wanted
            self._rounds.policy = replace(self._rounds.policy, limits=self._limits)
        self._count += 1
        try:
            self._status = self._said(self._rounds.run(), self._count)
        except ClusterError as error:
            logger.warning("the cluster cannot be seen: %s", error)
            self._status = replace(self._status, rounds=self._count, problem=str(error))
        except Exception as error:
            # Whatever it was, what serves goes on, and the next round begins with a fresh look.
            logger.exception("a round failed")
            self._status = replace(self._status, rounds=self._count, problem=f"{type(error).__name__}: {error}")

    def _run(self) -> None:
        while True:
            with self._changed:
                # A new wish, or the end, is not kept waiting.
                self._changed.wait_for(lambda: self._news, self._period_s)
                self._news = False
                if self._closing:
                    return
            self.run_round()

    def _said(self, report: RoundReport, rounds: int) -> Status:
        observed, desired = report.observed, self._rounds.desired
        replicas = adopt(observed, self._rounds.memory, now_s=self._clock())
        return Status(
            rounds=rounds,
            epoch=report.view.epoch,
            pools=tuple(self._pool(pool, replicas, report.view) for pool in desired.pools),
            cordoned=tuple(sorted(desired.cordoned)),
            leaving=tuple(sorted(desired.leaving)),
            nodes=tuple(
                NodeStatus(name=node.name, address=node.address, device_type=node.device_type, devices=node.devices)
                for node in observed.topology.nodes
            ),
            replicas=tuple(_replica(replica, report.view) for replica in replicas),
            shortages=report.shortages,
            problem="; ".join(why for _, why in report.refused),
        )

    def _pool(self, pool: PoolWish, replicas: Iterable[Replica], view: View) -> PoolStatus:
        backoff = self._rounds.memory.backoffs.get(pool.name)
        serving = coming = leaving = 0
        for replica in replicas:
            if replica.id.pool != pool.name:
                continue
            current = replica.spec.generation == pool.generation
            if current and replica.phase is Phase.READY and view.replica(str(replica.id)) is not None:
                serving += 1
            elif current and replica.phase in (*COMING, Phase.READY):
                coming += 1
            else:
                leaving += 1
        return PoolStatus(
            pool=pool.name,
            role=pool.role.value,
            degrees=pool.degrees,
            generation=str(pool.generation),
            wanted=pool.replicas,
            serving=serving,
            coming=coming,
            leaving=leaving,
            failures=backoff.failures if backoff is not None else 0,
        )


def _replica(replica: Replica, view: View) -> ReplicaStatus:
    return ReplicaStatus(
        replica=str(replica.id),
        pool=replica.id.pool,
        generation=str(replica.spec.generation),
        phase=replica.phase.value,
        routed=view.replica(str(replica.id)) is not None,
        devices=tuple(str(rank.device) for rank in replica.ranks),
        address=replica.driver.address if replica.driver is not None else "",
        why=replica.why,
        requests=replica.driver.requests if replica.driver is not None else 0,
        role=replica.spec.role.value,
        degrees=replica.spec.degrees,
        transfers=replica.driver.grants + replica.driver.transfers if replica.driver is not None else 0,
        ranks=tuple(
            RankStatus(
                rank=rank.rank,
                device=str(rank.device),
                state=rank.state.value,
                loaded=rank.loaded,
                detail=rank.detail,
            )
            for rank in replica.ranks
        ),
    )
