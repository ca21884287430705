"""The controller as an actor: named, detached, started again whenever it fails.

What it is started with is settings; what is wanted is in the ledger, and read again each time that it starts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...placement.topology import DeviceType, Link
from ..clock import monotonic_clock
from ..reconcile.desired import Limits
from ..reconcile.round import Assign, Policy
from ..rpc.secret import checked_secret
from ..rpc.tls import tls_from
from .cluster import Cluster, StaleController
from .controller import Controller
from .ledger import Deployment, Ledger
from .ray_cluster import RayCluster, RayStore, end_actor, start_actor
from .records import from_json, to_json
from .view_port import ViewPort, WatchedCluster

CONTROLLER_NAME = "controller"

_ROUND_PERIOD_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerSettings:
    """What a controller is started with, and again after each failure. ``deployment``: its actors' namespace.

    ``watch_address``: host:port at which gateways watch views, always the same, "" for none; ``secret``: the cluster's,
    which they have to know, "" for none.
    """

    deployment: str
    limits: Limits
    device_types: Mapping[str, DeviceType]
    network: Link
    device_link: Link
    watch_address: str = ""
    secret: str = field(default="", repr=False)


class ControllerActor:
    """Runs the controller; when it fails, the next one takes over what lives."""

    def __init__(self, settings_json: str, assign: Assign) -> None:
        self._settings = settings = from_json(ControllerSettings, settings_json)
        self._cluster = RayCluster(
            deployment=settings.deployment,
            device_types=settings.device_types,
            network=settings.network,
            device_link=settings.device_link,
            clock=monotonic_clock,
        )
        policy = Policy(assign=assign, limits=settings.limits)
        cluster: Cluster = self._cluster
        if settings.watch_address:
            port = ViewPort(settings.watch_address, secret=checked_secret(settings.secret), tls=tls_from(os.environ))
            port.publish(self._cluster.ledger.view())
            cluster = WatchedCluster(cluster, port)
        self._controller = Controller(cluster, policy, clock=monotonic_clock, period_s=_ROUND_PERIOD_S)
        self._want(self._cluster.ledger.deployment())
        self._controller.start()

    def pid(self) -> int:
        """Return its process."""
        return os.getpid()

    def runs_with(self, settings_json: str) -> bool:
        """Whether these are the settings that it was started with; how patient it is it may have been told since."""
        return replace(from_json(ControllerSettings, settings_json), limits=self._settings.limits) == self._settings

    def want(self, deployment_json: str) -> None:
        """Set what is wanted from now on. Raises: StaleController"""
        deployment = from_json(Deployment, deployment_json)
        if not self._cluster.ledger.keep_deployment(deployment):
            raise StaleController("somebody else has written what is wanted at the same time; look and try again")
        self._want(deployment)

    def status(self) -> str:
        """Return a ``Status`` as JSON."""
        return to_json(self._controller.status())

    def _want(self, deployment: Deployment) -> None:
        self._cluster.launches = deployment.launches
        self._controller.want(deployment.desired, deployment.limits)


def start_controller(settings: ControllerSettings, assign: Assign, *, node: str | None = None) -> Any:
    """Start a deployment's controller, or return the one that runs: a handle of a ``ControllerActor``.

    ``node``: the number of the node on which its watch address is; it runs there as long as that node is up.
    """
    return start_actor(ControllerActor, CONTROLLER_NAME, settings.deployment, to_json(settings), assign, node=node)


def end_controller(deployment: str) -> None:
    """End a deployment's controller for good, and forget what was kept for it; its replicas must have gone."""
    end_actor(CONTROLLER_NAME, deployment)
    Ledger(RayStore(), deployment=deployment).forget()
