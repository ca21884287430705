"""``slipstream up`` and ``slipstream update``: a cluster file becomes what runs.

Where the deployment runs already both do the same: what the file says now is wanted from now on, and what runs is
brought there, replica by replica.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...sdk.errors import ConfigError
from ..cluster.cluster_file import ClusterFile, read_cluster_file
from ..cluster.planning import plan_cluster
from ..cluster.topology_sections import device_types
from ..controller.ledger import Deployment
from .changes import changes
from .deployment import Given, check_can_run, choose, leaves_open, make_deployment, model_directory
from .progress import Event
from .reporter import Ending
from .session import Session
from .status import DeploymentStatus

_SECRET_BYTES = 32
_MARK_BYTES = 8
_MIN_KEY_CHARS = 8
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """A cluster file that is wanted now. ``ran``: whether the deployment ran before."""

    name: str
    wanted: Deployment
    ran: bool
    timeout_s: float


def read_runnable(path: Path) -> ClusterFile:
    """Read a cluster file that can be run, not only planned. Raises: ConfigError naming the field"""
    file = read_cluster_file(path)
    check_can_run(file)
    model = model_directory(file, path.parent)
    if not (model / "config.json").is_file():
        raise ConfigError(
            f"{path}: model.path",
            f"{model} is not a directory with a model (there is no config.json in it); it has to be at this path on "
            "every node",
        )
    return file


def apply(
    session: Session,
    path: Path,
    *,
    environment: Mapping[str, str],
    timeout_s: float | None,
    must_run: bool,
    port: int | None = None,
) -> Applied:
    """Let a cluster file be what is wanted.

    ``must_run``: refuse a deployment that does not run yet. ``port``: for gateways, in place of the file's.

    Raises: ConfigError and CheckpointError for the file; NoPlan when nothing fits; ClusterError
    """
    file = read_runnable(path)
    if port is not None:
        file = file.model_copy(update={"gateway": file.gateway.model_copy(update={"port": port})})
    name, operator = file.name, session.operator
    previous = session.ledger(name).deployment()
    ran = bool(previous.mark)
    if must_run and not ran:
        raise ConfigError(str(path), f"no deployment {name!r} runs that could be updated: start it with slipstream up")
    types = device_types(file.device_types)
    topology = operator.topology(types, previous.network, previous.device_link)
    ranking = plan_cluster(file, topology, directory=path.parent) if leaves_open(file) else None
    chosen = choose(file, ranking)
    watch = previous.watch_address
    if not watch or file.gateway.watch_port not in (0, _port(watch)):
        watch = operator.watch_address(file.gateway.watch_port)
    # The first gateway is where the controller is, the node that is there as long as the cluster is.
    head = watch.rpartition(":")[0]
    nodes = sorted(topology.nodes, key=lambda node: (node.address != head, node.name))
    given = Given(
        secret=previous.secret or secrets.token_hex(_SECRET_BYTES),
        mark=previous.mark or f"{name}/{secrets.token_hex(_MARK_BYTES)}",
        watch_address=watch,
        nodes=tuple(node.name for node in nodes),
        # Who tries something on one machine does not open it to all others.
        host=_LOOPBACK if operator.own else "",
        api_keys=_api_keys(file, environment),
    )
    wanted = make_deployment(file, chosen, directory=path.parent, given=given, device_types=types, previous=previous)
    if ran:
        told = changes(previous, wanted) or ("nothing changes",)
        session.reporter.events(Event(event="change", text=change) for change in told)
    session.ask(name, wanted)
    _keep_gateways(session, name, previous, wanted)
    return Applied(
        name=name,
        wanted=wanted,
        ran=ran,
        timeout_s=file.limits.start_timeout_s if timeout_s is None else timeout_s,
    )


def follow_applied(session: Session, applied: Applied) -> Ending:
    """Wait until all serves as the file says."""
    ending = session.follow(applied.name, applied.wanted, timeout_s=applied.timeout_s, done="")
    if ending.text or ending.status is None:
        return ending
    return Ending(exit_code=ending.exit_code, outcome=ending.outcome, text=_served(ending.status), status=ending.status)


def _keep_gateways(session: Session, name: str, previous: Deployment, wanted: Deployment) -> None:
    for order in previous.gateways:
        if wanted.gateway(order.name) is None:
            session.operator.end_gateway(name, order.name, drain_s=order.drain_s)
    # One after the other: while one is drained the others take requests.
    for order in wanted.gateways:
        session.operator.start_gateway(name, order)


def _served(status: DeploymentStatus) -> str:
    urls = ", ".join(f"http://{gateway.address}/v1" for gateway in status.gateways)
    return f"{status.name} serves {', '.join(status.served_names)} at {urls or 'no gateway'}"


def _api_keys(file: ClusterFile, environment: Mapping[str, str]) -> tuple[str, ...]:
    name = file.gateway.api_keys_env
    if name is None:
        return ()
    keys = tuple(dict.fromkeys(re.split(r"[\s,]+", environment.get(name, "").strip(", \n\t"))))
    if not all(len(key) >= _MIN_KEY_CHARS for key in keys):
        raise ConfigError(
            "gateway.api_keys_env", f"{name} has to hold API keys of at least {_MIN_KEY_CHARS} characters each"
        )
    return keys


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])
