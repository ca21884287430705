"""What the core asks of the shell. Values only.

The shell carries actions out in their order; one that fails changes nothing, and the next round decides anew. Stopping
and unrouting what is stopped or unrouted already does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...placement.topology import DeviceRef
from .observed import ReplicaId, ReplicaSpec
from .views import View


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishView:
    """Give every gateway and driver this view."""

    view: View


@dataclass(frozen=True, slots=True, kw_only=True)
class Unroute:
    """Let a driver take no more requests, for good; what runs may end."""

    replica: ReplicaId
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRank:
    """End a rank's process, whatever it does."""

    replica: ReplicaId
    rank: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StartGang:
    """Claim the replica's incarnation, then start all its ranks, rank ``i`` on ``devices[i]``, or none."""

    spec: ReplicaSpec
    devices: tuple[DeviceRef, ...]


Action = PublishView | Unroute | StopRank | StartGang
