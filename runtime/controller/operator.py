"""What operators' commands need of a platform: to see nodes, to keep a controller and gateways, to read logs, to look
for what is left.

Beside it stands ``Cluster``, which is what the controller itself needs. Commands may be given from any process that
reaches the platform; nothing here is on a request's way. All calls raise ``ClusterError`` when the platform does not
answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ...placement.topology import DeviceType, Link, Topology
from .cluster import ClusterError
from .controller import Status
from .gateway_keeper import GatewayOrder, GatewayReport
from .ledger import Deployment, Store
from .process_log import LogPage


class NoCluster(ClusterError):
    """There is no platform that could be reached."""


class OwnRaySilent(ClusterError):
    """The platform that was started on this machine runs and does not answer: all that is left is to end it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerSeen:
    """A deployment's controller. ``status``: what it says, None when it does not answer; ``detail``: why not."""

    alive: bool = False
    status: Status | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """What runs of a deployment: actors by name, processes as ``number on node``."""

    actors: tuple[str, ...] = ()
    processes: tuple[str, ...] = ()

    @property
    def nothing(self) -> bool:
        """Whether there is none."""
        return not (self.actors or self.processes)

    def __str__(self) -> str:
        actors = [f"actor {name}" for name in self.actors]
        return ", ".join([*actors, *(f"process {name}" for name in self.processes)]) or "nothing"


class Operator(Protocol):
    """A platform, as commands see it.

    ``address``: how it is reached. ``store``: where ledgers are. ``own``: whether it was started for one machine alone.
    """

    address: str
    own: bool
    store: Store

    def topology(self, device_types: Mapping[str, DeviceType], network: Link, device_link: Link) -> Topology:
        """Return the nodes that are there."""
        ...

    def watch_address(self, port: int) -> str:
        """Return where a controller is to give views: the head node's address with a port, or a free one for 0."""
        ...

    def controller(self, name: str) -> ControllerSeen:
        """Return how a deployment's controller is."""
        ...

    def start_controller(self, name: str, deployment: Deployment) -> None:
        """See to it that a controller runs that works with what the deployment says of it."""
        ...

    def want(self, name: str, deployment: Deployment) -> None:
        """Tell the controller what is wanted from now on; it keeps that."""
        ...

    def end_controller(self, name: str) -> None:
        """End the controller, if it is there; what it keeps is left alone."""
        ...

    def gateways(self, name: str, orders: tuple[GatewayOrder, ...]) -> tuple[GatewayReport, ...]:
        """Return how gateways are, in their order."""
        ...

    def start_gateway(self, name: str, order: GatewayOrder) -> None:
        """See to it that a gateway runs as ordered; one that runs otherwise is drained and replaced."""
        ...

    def end_gateway(self, name: str, gateway: str, *, drain_s: float) -> None:
        """End a gateway, if it is there; what runs may finish within so long."""
        ...

    def log(self, name: str, source: str, begin: int) -> LogPage | None:
        """Return what a process has printed from a line on, None if nobody keeps it.

        ``source``: ``rank/REPLICA/NUMBER`` or ``gateway/NAME``; ``begin``: as of ``ProcessLog.page``
        """
        ...

    def remains(self, name: str, mark: str) -> Remains:
        """Return what runs of a deployment, whoever knows of it; processes by their mark."""
        ...

    def end_all(self, name: str, mark: str) -> None:
        """End all that runs of a deployment, at once."""
        ...

    def close(self) -> None:
        """Leave the platform; nothing of it ends."""
        ...
