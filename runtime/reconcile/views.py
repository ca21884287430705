"""Views: immutable, numbered snapshots of who serves, as gateways and drivers are told. Values only."""

from __future__ import annotations

from dataclasses import dataclass

from ...placement.plan import Degrees, Role
from .desired import Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolView:
    """A pool that is wanted; it may have no replica at the moment."""

    name: str
    role: Role
    wanted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaView:
    """A replica that takes requests. Only replicas with equal ``generation.model`` may share one."""

    replica: str
    pool: str
    role: Role
    generation: Generation
    degrees: Degrees
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Who serves. A view with a higher epoch replaces one with a lower, never the other way round.

    ``begun``: whether the deployment has served before.
    """

    epoch: int = 0
    begun: bool = False
    pools: tuple[PoolView, ...] = ()
    replicas: tuple[ReplicaView, ...] = ()

    def says_the_same(self, other: View) -> bool:
        """Whether two views differ in their numbers at most."""
        return (self.begun, self.pools, self.replicas) == (other.begun, other.pools, other.replicas)

    def replica(self, name: str) -> ReplicaView | None:
        """Return a replica, None if it is not in the view."""
        return next((replica for replica in self.replicas if replica.replica == name), None)
