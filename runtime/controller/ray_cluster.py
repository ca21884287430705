"""The platform that is Ray: nodes, one actor for each rank, a store for the ledger.

Each rank is a named, detached actor, bound to its node and to the resource that stands for its device; the process of
the rank is its child. No placement groups: they reserve places that Ray then picks among, while here every rank's place
is decided already, one actor asks for exactly one device, and nothing is left over that would have to be given back.

A rank is listed as long as its actor lives or nobody has told it to end. Ranks are asked all at once and for a bounded
time; one that does not answer in it is listed as it was last known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ...placement.topology import DeviceType, Link
from ..clock import Clock
from ..reconcile.actions import StartGang, StopRank, Unroute
from ..reconcile.observed import DriverSeen, Observed, RankSeen, RankState, ReplicaSpec
from ..reconcile.views import View
from .cluster import ClusterError, StaleController, StartRefused
from .known_links import KnownLinks
from .launch import Launch, RankOrder, ranks_per_host
from .ledger import EVERYWHERE, Gang, Ledger
from .node_facts import NodeFacts, one_of_each, topology_of
from .rank_keeper import KeeperReport, RankKeeper
from .records import from_json, to_json

_KV_NAMESPACE = b"slipstream"
_REPORT_TIMEOUT_S = 1.0
_END_PATIENCE_S = 10.0
_CONCURRENCY = 4
_A_LITTLE = 0.001


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    """Say in our words that Ray does not answer."""
    try:
        yield
    except (RayError, RuntimeError) as error:
        raise ClusterError(f"Ray does not answer: {error}") from error


class RayStore:
    """Ray's key-value store, as a ``Store``. All calls raise ``ClusterError`` when Ray does not answer."""

    def put(self, key: str, value: str) -> None:
        """Write a key."""
        with _asking():
            _internal_kv_put(key.encode(), value.encode(), overwrite=True, namespace=_KV_NAMESPACE)

    def put_new(self, key: str, value: str) -> bool:
        """Write a key that is not there; return whether this was the first."""
        with _asking():
            return not _internal_kv_put(key.encode(), value.encode(), overwrite=False, namespace=_KV_NAMESPACE)

    def get(self, key: str) -> str | None:
        """Return a key's value, None if it is not there."""
        with _asking():
            value: Any = _internal_kv_get(key.encode(), namespace=_KV_NAMESPACE)
            return None if value is None else bytes(value).decode()

    def keys(self, prefix: str) -> list[str]:
        """Return the keys that begin so."""
        with _asking():
            return [bytes(key).decode() for key in _internal_kv_list(prefix.encode(), namespace=_KV_NAMESPACE)]

    def delete(self, key: str) -> None:
        """Remove a key if it is there."""
        with _asking():
            _internal_kv_del(key.encode(), namespace=_KV_NAMESPACE)


class RankActor:
    """Holds a rank's keeper on the rank's node."""

    def __init__(self, order: str) -> None:
        self._keeper = RankKeeper(from_json(RankOrder, order))

    def report(self) -> str:
        return to_json(self._keeper.report())

    def log(self, begin: int) -> str:
        return to_json(self._keeper.log(begin))

    def meet(self, meeting: str) -> None:
        self._keeper.meet(meeting)

    def unroute(self) -> None:
        self._keeper.unroute()

    def end(self) -> None:
        self._keeper.end()
        leave: Any = ray.actor.exit_actor
        leave()


@dataclass(slots=True)
class _Known:
    """What this process knows of one rank. ``asked``: a call that has no answer yet. Units: stop_s, when told to end"""

    handle: Any = None
    asked: Any = None
    report: KeeperReport | None = None
    stop_s: float | None = None


@dataclass(slots=True)
class RayCluster:
    """A ``Cluster`` on Ray; the process must be connected to it. ``deployment``: the namespace of its actors."""

    deployment: str
    device_types: Mapping[str, DeviceType]
    network: Link
    device_link: Link
    clock: Clock
    launches: Mapping[str, Launch] = field(default_factory=dict)
    ledger: Ledger = field(init=False)
    _known: dict[str, _Known] = field(default_factory=dict)
    _links: KnownLinks = field(init=False)

    def __post_init__(self) -> None:
        self.ledger = Ledger(RayStore(), deployment=self.deployment)
        self._links = KnownLinks(Ledger(RayStore(), deployment=EVERYWHERE))

    # ------------------------------------------------------------------ seeing

    def observe(self) -> Observed:
        """Return what is there now."""
        try:
            nodes, gangs = list_nodes(), self.ledger.gangs()
            living = [gang for gang in gangs.values() if not gang.gone]
            alive = self._ask(_name(gang.spec, rank) for gang in living for rank in range(len(gang.devices)))
            view = self.ledger.view()
            topology = topology_of(
                nodes,
                self.device_types,
                network=self.network,
                device_link=self.device_link,
                links=self._links.between(nodes),
            )
        except RayError as error:
            raise ClusterError(f"Ray does not answer: {error}") from error
        ranks: list[RankSeen] = []
        drivers: list[DriverSeen] = []
        numbers = {node.number for node in nodes}
        for gang in living:
            of_gang = self._ranks(gang, alive, numbers)
            ranks += of_gang
            driver = alive.get(_name(gang.spec, 0))
            if driver is not None and driver.driver is not None:
                drivers.append(driver.driver)
            if driver is not None and driver.meeting:
                self._introduce(gang, driver.meeting, alive)
            if not of_gang:
                self.ledger.keep_gang(replace(gang, gone=True))
            elif not gang.ready and all(rank.state is RankState.READY for rank in of_gang):
                self.ledger.keep_gang(replace(gang, ready=True))
        return Observed(
            topology=topology,
            ranks=tuple(ranks),
            drivers=tuple(drivers),
            view=view,
            incarnation=max(gangs, default=0),
        )

    def processes(self) -> dict[str, int]:
        """Return the ranks' processes, as far as they are known: rank's name → process number on its node."""
        return {name: known.report.pid for name, known in self._known.items() if known.report and known.report.pid}

    def _ranks(self, gang: Gang, alive: Mapping[str, KeeperReport | None], numbers: set[str]) -> list[RankSeen]:
        """Return a replica's ranks, without those that have ended as they were told."""
        found = []
        for rank, device in enumerate(gang.devices):
            name, gone = _name(gang.spec, rank), gang.numbers[rank] not in numbers
            # A node that Ray has given up does not come back: what is left on it ends when it meets the others again.
            if name not in alive and (gone or rank in gang.stopped):
                self._known.pop(name, None)
                continue
            state, detail, loaded = RankState.FAILED, "its actor is gone", 0.0
            if gone:
                state, detail = RankState.LOST, "its node is gone"
            elif name in alive:
                report = alive[name] or self._known[name].report
                state, detail = RankState.READY if gang.ready else RankState.STARTING, ""
                if report is not None:
                    state, detail, loaded = report.state, report.detail, report.loaded
            found.append(RankSeen(spec=gang.spec, rank=rank, device=device, state=state, detail=detail, loaded=loaded))
        return found

    def _introduce(self, gang: Gang, meeting: str, alive: Mapping[str, KeeperReport | None]) -> None:
        """Tell a replica's ranks what its driver says of where they meet."""
        for rank in range(1, len(gang.devices)):
            name = _name(gang.spec, rank)
            report = alive.get(name)
            if report is not None and not report.told:
                self._known[name].handle.meet.remote(meeting)

    def _ask(self, names: Iterable[str]) -> dict[str, KeeperReport | None]:
        """Ask ranks: name → what it says, None if it has not answered; those whose actors are gone are left out."""
        found: dict[str, KeeperReport | None] = {}
        for name in names:
            handle = self._handle(name)
            if handle is not None:
                found[name] = None
                known = self._known[name]
                # At most one question is on its way to each, however long it does not answer.
                known.asked = known.asked or handle.report.remote()
        asked = {self._known[name].asked: name for name in found}
        if asked:
            answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_REPORT_TIMEOUT_S)
            for reference in answered:
                self._take(asked[reference], reference, found)
        return found

    def _take(self, name: str, reference: Any, found: dict[str, KeeperReport | None]) -> None:
        known = self._known[name]
        known.asked = None
        try:
            known.report = found[name] = from_json(KeeperReport, ray.get(reference, timeout=_REPORT_TIMEOUT_S))
        except (GetTimeoutError, ActorUnavailableError):
            # Its node may be out of reach for a moment; whether it is gone, Ray will say.
            return
        except RayActorError:
            known.handle = None
            del found[name]

    # ------------------------------------------------------------------ acting

    def start(self, gang: StartGang) -> None:
        """Claim an incarnation and start all its ranks, each on its device, or none."""
        launch = self.launches.get(gang.spec.id.pool)
        if launch is None:
            raise StartRefused(f"nobody has said how ranks of pool {gang.spec.id.pool} are started")
        nodes = {node.name: node for node in one_of_each(list_nodes())}
        if gone := sorted({device.node for device in gang.devices if device.node not in nodes}):
            raise StartRefused(f"{gang.spec.id}: node {', '.join(gone)} is gone")
        numbers = tuple(nodes[device.node].number for device in gang.devices)
        kept = Gang(spec=gang.spec, devices=gang.devices, numbers=numbers)
        if not self.ledger.claim_gang(kept):
            raise StaleController(f"incarnation {gang.spec.id.incarnation} was claimed before")
        try:
            for rank, device in enumerate(gang.devices):
                self._start_rank(kept, rank, nodes[device.node], launch)
        except RayError as error:
            # Told to end, those that were made are listed until they have, and the others are not.
            for rank in range(len(gang.devices)):
                self.stop(StopRank(replica=gang.spec.id, rank=rank, why="its gang was not started"))
            raise StartRefused(f"{gang.spec.id}: {error}") from error

    def stop(self, stop: StopRank) -> None:
        """End a rank, whatever it does; one that does not listen is ended by Ray."""
        gang = self.ledger.gangs().get(stop.replica.incarnation)
        if gang is None or gang.gone:
            return
        self.ledger.keep_gang(replace(gang, stopped=gang.stopped | {stop.rank}))
        name = _name(gang.spec, stop.rank)
        handle = self._handle(name)
        if handle is None:
            return
        known = self._known[name]
        if known.stop_s is None:
            known.stop_s = self.clock()
            handle.end.remote()
        elif self.clock() - known.stop_s >= _END_PATIENCE_S:
            ray.kill(handle, no_restart=True)

    def unroute(self, unroute: Unroute) -> None:
        """Let a driver admit nothing more."""
        gang = self.ledger.gangs().get(unroute.replica.incarnation)
        handle = None if gang is None else self._handle(_name(gang.spec, 0))
        if handle is None:
            raise ClusterError(f"{unroute.replica} has no driver")
        handle.unroute.remote()

    def publish(self, view: View) -> None:
        """Keep a view for whoever watches."""
        if not self.ledger.claim_view(view):
            raise StaleController(f"epoch {view.epoch} was published before")

    def _start_rank(self, gang: Gang, rank: int, node: NodeFacts, launch: Launch) -> None:
        index = gang.devices[rank].index
        launch = replace(launch, environment={**node.environment(index), **launch.environment})
        order = RankOrder(
            spec=gang.spec,
            rank=rank,
            address=node.address,
            device=index,
            launch=launch,
            ranks_on_host=sum(device.node == node.name for device in gang.devices),
            ranks_per_host=ranks_per_host(gang.devices),
        )
        claim = node.claim(index)
        name = _name(gang.spec, rank)
        actor: Any = ray.remote(RankActor)
        started = actor.options(
            name=name,
            namespace=self.deployment,
            lifetime="detached",
            num_cpus=0,
            # What a rank has computed is lost with its process: another replica takes its place.
            max_restarts=0,
            max_concurrency=_CONCURRENCY,
            num_gpus=claim.pop("GPU", 0.0),
            resources=claim,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node.number, soft=False),
            runtime_env=_RUNTIME_ENV,
        )
        self._known[name] = _Known(handle=started.remote(to_json(order)))

    def _handle(self, name: str) -> Any:
        known = self._known.setdefault(name, _Known())
        if known.handle is None:
            try:
                known.handle = ray.get_actor(name, namespace=self.deployment)
            except ValueError:
                return None
        return known.handle


# ------------------------------------------------------------------ actors


def start_actor(kind: type, name: str, namespace: str, *arguments: Any, node: str | None = None) -> Any:
    """Start a detached actor that Ray starts again whenever it fails, or return the one that runs; its handle.

    ``node``: the number of the node that it runs on as long as that is up.
    """
    actor: Any = ray.remote(kind)
    where = "DEFAULT" if node is None else NodeAffinitySchedulingStrategy(node_id=node, soft=True)
    return actor.options(
        name=name,
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        # Ray puts an actor that needs nothing on any node, whichever it was asked for.
        num_cpus=0 if node is None else _A_LITTLE,
        max_restarts=-1,
        max_concurrency=_CONCURRENCY,
        scheduling_strategy=where,
        runtime_env=_RUNTIME_ENV,
    ).remote(*arguments)


def end_actor(name: str, namespace: str) -> None:
    """End an actor for good, if it is there."""
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(name, namespace=namespace), no_restart=True)


def task_on(work: Callable[[str], Any], node: NodeFacts, argument: str) -> Any:
    """Call a function on a node, once; a reference to what it returns."""
    task: Any = ray.remote(work)
    return task.options(
        num_cpus=0,
        max_retries=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node.number, soft=False),
        runtime_env=_RUNTIME_ENV,
    ).remote(argument)


_RUNTIME_ENV = {"env_vars": {"PYTHONSAFEPATH": "1", "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
"""The root of a clone must not be on the path of what runs there; and devices are chosen here, not by Ray."""


def list_nodes(*, with_available: bool = False) -> list[NodeFacts]:
    """Return the nodes that Ray holds to be alive; if asked, with what nobody has of their resources."""
    listed: Any = ray.nodes
    # Ray does not annotate it.
    ask_available: Any = available_resources_per_node
    available: Mapping[str, Mapping[str, float]] = ask_available() if with_available else {}
    return [
        NodeFacts(
            number=node["NodeID"],
            address=node["NodeManagerAddress"],
            resources=node["Resources"],
            labels=node.get("Labels") or {},
            available=available.get(node["NodeID"]),
        )
        for node in listed()
        if node["Alive"]
    ]


def helper_on(kind: type, node: NodeFacts, *arguments: Any) -> Any:
    """Start an actor on a node that ends with this process; its handle."""
    actor: Any = ray.remote(kind)
    return actor.options(
        num_cpus=0,
        max_concurrency=_CONCURRENCY,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node.number, soft=False),
        runtime_env=_RUNTIME_ENV,
    ).remote(*arguments)


def answer_of(call: Any, *, timeout_s: float) -> Any:
    """Return what an actor's call comes to. Raises: ClusterError when it does not, in this time"""
    try:
        return ray.get(call, timeout=timeout_s)
    except GetTimeoutError as error:
        raise ClusterError(f"there is no answer after {timeout_s:.0f} s") from error
    except RayError as error:
        raise ClusterError(str(error).splitlines()[0]) from error


def _name(spec: ReplicaSpec, rank: int) -> str:
    """Return the name of a rank's actor, which no other has ever had."""
    return f"rank/{spec.id}/{rank}"
