"""What the controller needs of a platform: to see nodes and ranks, to start and stop them, to be heard by gateways.

    ClusterError            blame: peer, retryable
    ├── StartRefused        the ranks of a replica were not started, none of them
    └── StaleController     another controller has published or started since; this one must look again

Implementations pass one contract suite (``tests/contracts/cluster.py``). A call may fail at any time; what was asked
for is then judged by looking again.
"""

from __future__ import annotations

from typing import Protocol

from ...sdk.errors import Blame, SlipstreamError
from ..reconcile.actions import StartGang, StopRank, Unroute
from ..reconcile.observed import Observed
from ..reconcile.views import View


class ClusterError(SlipstreamError):
    """The platform did not do what it was asked."""

    retryable = True
    blame = Blame.PEER


class StartRefused(ClusterError):
    """A replica was not started: a node is gone, a device is taken, or the platform says no."""


class StaleController(ClusterError):
    """A number was used already: an epoch or an incarnation that another controller has claimed."""


class Cluster(Protocol):
    """A platform.

    What must hold, whatever fails and whoever restarts:

    - a node is listed with all ranks that run on it, or not at all;
    - the ranks of a replica are listed from ``start`` on, all of them, until they have ended;
    - a rank that has ended by itself is listed as failed until it is stopped, or no longer listed;
    - an incarnation is claimed once, an epoch published once, and both only grow.
    """

    def observe(self) -> Observed:
        """Return what is there now. Raises: ClusterError"""
        ...

    def start(self, gang: StartGang) -> None:
        """Claim an incarnation and start all its ranks, each on its device, or none.

        Raises: StaleController when the incarnation is not above all that were claimed; StartRefused
        """
        ...

    def stop(self, stop: StopRank) -> None:
        """End a rank, whatever it does. Idempotent; returns before it has ended. Raises: ClusterError"""
        ...

    def unroute(self, unroute: Unroute) -> None:
        """Let a driver admit nothing more, for good. Idempotent. Raises: ClusterError"""
        ...

    def publish(self, view: View) -> None:
        """Keep a view and give it to whoever watches.

        Raises: StaleController when its epoch is not above the last; ClusterError
        """
        ...
