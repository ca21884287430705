"""Facts for the tests of the controller's core: small clusters in few words.

nodes("a:2 b:4")                 a topology of two nodes with so many devices
replica("p", 3, "a/0 a/1")       the ranks of p-3, ready, and its driver
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from slipstream.placement.plan import Degrees, ReplicaPlace, Role
from slipstream.placement.topology import DeviceRef, DeviceType, Link, Node, Topology
from slipstream.runtime.reconcile.actions import Action, PublishView, StartGang, StopRank, Unroute
from slipstream.runtime.reconcile.desired import Desired, Generation, Limits, PoolWish
from slipstream.runtime.reconcile.memory import Memory
from slipstream.runtime.reconcile.observed import DriverSeen, Observed, RankSeen, RankState, ReplicaId, ReplicaSpec
from slipstream.runtime.reconcile.reconcile import Decision, reconcile
from slipstream.runtime.reconcile.round import Policy
from slipstream.runtime.reconcile.views import PoolView, ReplicaView, View
from slipstream.tests.fakes.first_fit import first_fit

LIMITS = Limits(starting_s=10.0, loading_s=100.0, drain_s=30.0, first_pause_s=1.0, longest_pause_s=8.0, stable_s=50.0)
POLICY = Policy(assign=first_fit, limits=LIMITS)
_LINK = Link(bytes_per_s=1e9, latency_s=1e-4)
_CPU = DeviceType(name="cpu", memory_bytes=1 << 30, flops={}, memory_bytes_per_s=1e9)


def nodes(text: str) -> Topology:
    """Return a topology from names and numbers of devices."""
    found = []
    for word in text.split():
        name, _, devices = word.partition(":")
        found.append(
            Node(name=name, address=f"{name}.test", device_type="cpu", devices=int(devices), device_link=_LINK)
        )
    return Topology(nodes=tuple(found), device_types={"cpu": _CPU}, network=_LINK)


def place(text: str) -> ReplicaPlace:
    """Return devices from words such as a/0."""
    words = [word.partition("/") for word in text.split()]
    return ReplicaPlace(devices=tuple(DeviceRef(node=node, index=int(index)) for node, _, index in words))


def pool(name: str = "p", replicas: int = 1, *, tp: int = 1, role: Role = Role.MIXED, model: int = 1) -> PoolWish:
    """Return a pool's wish."""
    generation = Generation(model=model)
    return PoolWish(name=name, role=role, degrees=Degrees(tp=tp), replicas=replicas, generation=generation)


@dataclass(frozen=True)
class Facts:
    """One replica: its ranks and its driver."""

    ranks: tuple[RankSeen, ...]
    driver: DriverSeen | None

    @property
    def name(self) -> str:
        return str(self.ranks[0].spec.id)

    def states(self, *states: RankState) -> Facts:
        """Return it with other states of its first ranks."""
        changed = [replace(rank, state=state) for rank, state in zip(self.ranks, states, strict=False)]
        return replace(self, ranks=(*changed, *self.ranks[len(changed) :]))

    def without(self, *numbers: int) -> Facts:
        """Return it without some ranks."""
        return replace(self, ranks=tuple(rank for rank in self.ranks if rank.rank not in numbers))

    def driven(self, **changes: object) -> Facts:
        """Return it with a driver that says something else."""
        assert self.driver is not None
        return replace(self, driver=replace(self.driver, **changes))  # type: ignore[arg-type]

    @property
    def silent(self) -> Facts:
        """It with a driver that does not answer."""
        return replace(self, driver=None)

    @property
    def loading(self) -> Facts:
        """It before it is ready."""
        return replace(self.states(*(RankState.LOADING,) * len(self.ranks)), driver=None)


def replica(
    pool: str, incarnation: int, devices: str, *, role: Role = Role.MIXED, model: int = 1, **driver: int
) -> Facts:
    """Return a replica that serves."""
    where = place(devices).devices
    id = ReplicaId(pool=pool, incarnation=incarnation)
    spec = ReplicaSpec(id=id, role=role, generation=Generation(model=model), degrees=Degrees(tp=len(where)))
    ranks = tuple(
        RankSeen(spec=spec, rank=rank, device=device, state=RankState.READY) for rank, device in enumerate(where)
    )
    address = f"{where[0].node}.test:{5000 + incarnation}"
    return Facts(ranks, DriverSeen(replica=id, address=address, proven=True, admitting=True, **driver))


def view(epoch: int, pools: Iterable[PoolWish], *served: Facts) -> View:
    """Return the view that names these replicas."""
    return View(
        epoch=epoch,
        begun=True,
        pools=tuple(PoolView(name=each.name, role=each.role, wanted=each.replicas) for each in pools),
        replicas=tuple(
            ReplicaView(
                replica=facts.name,
                pool=facts.ranks[0].spec.id.pool,
                role=facts.ranks[0].spec.role,
                generation=facts.ranks[0].spec.generation,
                degrees=facts.ranks[0].spec.degrees,
                address=f"{facts.ranks[0].device.node}.test:{5000 + facts.ranks[0].spec.id.incarnation}",
            )
            for facts in served
        ),
    )


def observed(topology: Topology, *replicas: Facts, last: View | None = None, incarnation: int = 0) -> Observed:
    """Return what is seen."""
    ranks = tuple(rank for facts in replicas for rank in facts.ranks)
    highest = max([incarnation, *(rank.spec.id.incarnation for rank in ranks)])
    return Observed(
        topology=topology,
        ranks=ranks,
        drivers=tuple(facts.driver for facts in replicas if facts.driver is not None),
        view=last or View(),
        incarnation=highest,
    )


class Story:
    """Rounds one after the other, with the memory carried on."""

    def __init__(self) -> None:
        self.memory = Memory()

    def round(self, desired: Desired, seen: Observed, *, now_s: float = 0.0) -> Decision:
        decision = reconcile(desired, seen, self.memory, POLICY, now_s=now_s)
        self.memory = decision.memory
        return decision


def said(actions: Sequence[Action]) -> list[str]:
    """Return actions in few words."""
    words = []
    for action in actions:
        match action:
            case PublishView(view=view):
                words.append(f"view {view.epoch}: {' '.join(replica.replica for replica in view.replicas)}".strip())
            case Unroute(replica=id):
                words.append(f"unroute {id}")
            case StopRank(replica=id, rank=rank):
                words.append(f"stop {id} {rank}")
            case StartGang(spec=spec, devices=devices):
                words.append(f"start {spec.id} on {' '.join(map(str, devices))}")
    return words
