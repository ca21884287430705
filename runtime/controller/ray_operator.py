"""Ray, as operators' commands see it: an ``Operator``. The controller's own side of it is ``ray_cluster``.

Asks actors by their names, each for a bounded time. A command is there for seconds or minutes and then leaves; what it
has started is detached and stays. Gateways run on the nodes that they are ordered to as long as those are up.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError

from ...placement.assign import assign
from ...placement.topology import DeviceType, Link, Topology
from ..clock import monotonic_clock
from .cluster import ClusterError
from .controller import Status
from .controller_actor import CONTROLLER_NAME, ControllerSettings, start_controller
from .gateway_keeper import GatewayKeeper, GatewayOrder, GatewayReport
from .known_links import KnownLinks
from .ledger import EVERYWHERE, Deployment, Ledger, Store
from .marked_processes import end_marked, marked
from .node_facts import NodeFacts, topology_of
from .operator import ControllerSeen, Remains
from .process_log import LogPage
from .ray_cluster import RayStore, end_actor, list_nodes, start_actor, task_on
from .ray_connection import connected
from .records import from_json, to_json

_ANSWER_TIMEOUT_S = 5.0
_START_TIMEOUT_S = 60.0
_END_MARGIN_S = 30.0
_PAUSE_S = 0.1
_HEAD_RESOURCE = "node:__internal_head__"
# Below the ports that systems give to whoever asks for any: it is still free when a controller starts again.
_FIRST_PORT, _PORTS, _PORT_TRIES = 20_000, 12_000, 64


class GatewayActor:
    """Holds a gateway's keeper on the gateway's node."""

    def __init__(self, order: str) -> None:
        self._order = from_json(GatewayOrder, order)
        number = ray.get_runtime_context().get_node_id()
        here = next(node for node in list_nodes() if node.number == number)
        self._keeper = GatewayKeeper(self._order, node=here.name, own_address=here.address, clock=monotonic_clock)

    def report(self) -> str:
        return to_json(self._keeper.report())

    def runs_as(self, order: str) -> bool:
        return self._order == from_json(GatewayOrder, order)

    def log(self, begin: int) -> str:
        return to_json(self._keeper.log(begin))

    def end(self, drain_s: float) -> None:
        self._keeper.end(drain_s=drain_s)


@contextlib.contextmanager
def operating(address: str, *, environment: Mapping[str, str] | None = None) -> Iterator[RayOperator]:
    """Reach the Ray at an address, for as long as the block runs. ``environment``: what Ray is to find in it meanwhile.

    Raises: ClusterError
    """
    with connected(address, environment=environment):
        yield RayOperator()


class RayOperator:
    """An ``Operator`` on the Ray that this process is connected to."""

    def __init__(self) -> None:
        self.address = str(ray.get_runtime_context().gcs_address)
        self.own = False
        self.store: Store = RayStore()

    # ------------------------------------------------------------------ nodes

    def topology(self, device_types: Mapping[str, DeviceType], network: Link, device_link: Link) -> Topology:
        """Return the nodes that are there, with their links as far as they were measured."""
        nodes = _listed()
        links = KnownLinks(Ledger(self.store, deployment=EVERYWHERE)).between(nodes)
        return topology_of(nodes, device_types, network=network, device_link=device_link, links=links)

    def watch_address(self, port: int) -> str:
        """Return the head node's address with a port, or one that is free there."""
        head = _head()
        if not port:
            (port,) = _on_nodes(_free_port, head.address, nodes=[head]).values()
        return f"{head.address}:{port}"

    # ------------------------------------------------------------------ controller

    def controller(self, name: str) -> ControllerSeen:
        """Return how a deployment's controller is."""
        handle = _actor(name, CONTROLLER_NAME)
        if handle is None:
            return ControllerSeen(detail="no controller runs")
        try:
            return ControllerSeen(alive=True, status=from_json(Status, _answer(handle.status.remote())))
        except ClusterError as error:
            return ControllerSeen(detail=f"the controller does not answer: {error}")

    def start_controller(self, name: str, deployment: Deployment) -> None:
        """Start a controller, or another one where one runs with other settings."""
        settings = ControllerSettings(
            deployment=name,
            limits=deployment.limits,
            device_types=deployment.device_types,
            network=deployment.network,
            device_link=deployment.device_link,
            watch_address=deployment.watch_address,
            secret=deployment.secret,
        )

        def start() -> bool:
            handle = start_controller(settings, assign, node=_head().number)
            return bool(_answer(handle.runs_with.remote(to_json(settings)), timeout_s=_START_TIMEOUT_S))

        _until_as_ordered(start, lambda: self.end_controller(name), what="the controller")

    def want(self, name: str, deployment: Deployment) -> None:
        """Tell the controller what is wanted from now on."""
        handle = _actor(name, CONTROLLER_NAME)
        if handle is None:
            raise ClusterError(f"no controller of {name} runs")
        _answer(handle.want.remote(to_json(deployment)), timeout_s=_START_TIMEOUT_S)

    def end_controller(self, name: str) -> None:
        """End the controller, if it is there."""
        _end(name, CONTROLLER_NAME)

    # ------------------------------------------------------------------ gateways

    def gateways(self, name: str, orders: tuple[GatewayOrder, ...]) -> tuple[GatewayReport, ...]:
        """Return how gateways are."""
        handles = [_actor(name, _gateway(order.name)) for order in orders]
        asked = [handle and handle.report.remote() for handle in handles]
        found = []
        for order, reference in zip(orders, asked, strict=True):
            report = GatewayReport(name=order.name, node=order.node, detail="nobody keeps it")
            if reference is not None:
                try:
                    report = from_json(GatewayReport, _answer(reference))
                except ClusterError as error:
                    report = replace(report, detail=f"its keeper does not answer: {error}")
            found.append(report)
        return tuple(found)

    def start_gateway(self, name: str, order: GatewayOrder) -> None:
        """Start a gateway, or another one where one runs with another order."""
        numbers = {node.name: node.number for node in _listed()}
        text, actor = to_json(order), _gateway(order.name)

        def start() -> bool:
            node = numbers.get(order.node, _head().number)
            handle = start_actor(GatewayActor, actor, name, text, node=node)
            return bool(_answer(handle.runs_as.remote(text), timeout_s=_START_TIMEOUT_S))

        _until_as_ordered(
            start, lambda: self.end_gateway(name, order.name, drain_s=order.drain_s), what=f"gateway {order.name}"
        )

    def end_gateway(self, name: str, gateway: str, *, drain_s: float) -> None:
        """End a gateway, if it is there."""
        handle = _actor(name, _gateway(gateway))
        if handle is None:
            return
        with contextlib.suppress(ClusterError):
            _answer(handle.end.remote(drain_s), timeout_s=drain_s + _END_MARGIN_S)
        # A process that nobody keeps any more ends by itself.
        _end(name, _gateway(gateway))

    # ------------------------------------------------------------------ what runs

    def log(self, name: str, source: str, begin: int) -> LogPage | None:
        """Return what a process has printed; actors have their processes' names."""
        handle = _actor(name, source)
        if handle is None:
            return None
        try:
            return from_json(LogPage, _answer(handle.log.remote(begin)))
        except ClusterError:
            if _actor(name, source) is None:
                return None
            raise

    def remains(self, name: str, mark: str) -> Remains:
        """Return what runs of a deployment."""
        processes = _on_nodes(marked, mark, nodes=_listed()) if mark else {}
        return Remains(
            actors=tuple(sorted(_names(name))),
            processes=tuple(f"{pid} on {node}" for node, pids in processes.items() for pid in pids),
        )

    def end_all(self, name: str, mark: str) -> None:
        """End all that runs of a deployment, at once."""
        for actor in _names(name):
            _end(name, actor)
        if mark:
            _on_nodes(end_marked, mark, nodes=_listed())

    def close(self) -> None:
        """Leave Ray."""
        ray.shutdown()


# ------------------------------------------------------------------ asking


def _answer(reference: Any, *, timeout_s: float = _ANSWER_TIMEOUT_S) -> Any:
    """Wait for an answer. Raises: ClusterError"""
    try:
        return ray.get(reference, timeout=timeout_s)
    except GetTimeoutError as error:
        raise ClusterError(f"no answer within {timeout_s:g} s") from error
    except ClusterError:
        raise
    except ActorUnavailableError as error:
        raise ClusterError("it is starting again, or out of reach") from error
    except RayError as error:
        raise ClusterError(str(error).partition("\n")[0] or type(error).__name__) from error


def _until_as_ordered(start: Callable[[], bool], end: Callable[[], None], *, what: str) -> None:
    """Start an actor until one runs as ordered: one that runs otherwise, or has just been ended, is not it.

    ``end`` ends one that runs otherwise, which may take as long as it drains.
    """
    deadline_s, never, ended = monotonic_clock() + _START_TIMEOUT_S, threading.Event(), False
    while True:
        problem = "one that runs otherwise does not end"
        try:
            if start():
                return
            if not ended:
                end()
                deadline_s, ended = monotonic_clock() + _START_TIMEOUT_S, True
        except ClusterError as error:
            problem = str(error)
        if monotonic_clock() >= deadline_s:
            raise ClusterError(f"{what} did not start within {_START_TIMEOUT_S:g} s: {problem}")
        never.wait(_PAUSE_S)


def _actor(namespace: str, name: str) -> Any:
    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError:
        return None
    except RayError as error:
        raise ClusterError(f"Ray does not answer: {error}") from error


def _end(namespace: str, name: str) -> None:
    """End an actor for good and wait until its name is free."""
    deadline_s, never = monotonic_clock() + _END_MARGIN_S, threading.Event()
    while monotonic_clock() < deadline_s:
        with contextlib.suppress(RayActorError):
            end_actor(name, namespace)
        if name not in _names(namespace):
            return
        never.wait(_PAUSE_S)
    raise ClusterError(f"actor {name} of {namespace} does not end")


def _names(namespace: str) -> set[str]:
    """Return the names of a deployment's actors."""
    listed: Any = ray.util.list_named_actors
    try:
        return {actor["name"] for actor in listed(all_namespaces=True) if actor["namespace"] == namespace}
    except RayError as error:
        raise ClusterError(f"Ray does not answer: {error}") from error


def _gateway(name: str) -> str:
    return f"gateway/{name}"


# ------------------------------------------------------------------ nodes


def _listed() -> list[NodeFacts]:
    try:
        return list_nodes()
    except RayError as error:
        raise ClusterError(f"Ray does not answer: {error}") from error


def _head() -> NodeFacts:
    """Return the node that Ray's own services are on, which is there as long as Ray is."""
    nodes = _listed()
    heads = [node for node in nodes if _HEAD_RESOURCE in node.resources]
    if not nodes:
        raise ClusterError("Ray lists no node")
    return (heads or nodes)[0]


def _on_nodes(work: Callable[[str], Any], argument: str, *, nodes: list[NodeFacts]) -> dict[str, Any]:
    """Call a function on nodes: name of the node → what it returned."""
    asked = {node.name: task_on(work, node, argument) for node in nodes}
    return {name: _answer(reference, timeout_s=_START_TIMEOUT_S) for name, reference in asked.items()}


def _free_port(address: str) -> int:
    for _ in range(_PORT_TRIES):
        port = _FIRST_PORT + secrets.randbelow(_PORTS)
        with contextlib.suppress(OSError), socket.create_server((address, port)):
            return port
    raise ClusterError(f"no port is free on {address}")
