"""How the process of a rank is started, as a value that travels: a module and its arguments.

In arguments these stand for the rank's own: ``{address}`` its node's address, ``{rank}`` its number, ``{replica}`` its
replica's name, ``{device}`` its device's index on the node, ``{ranks_on_host}`` how many ranks of the replica are on
that node, ``{ranks_per_host}`` into how large pieces, in their order, the replica's ranks can be cut so that those of
each piece are on one node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import gcd

from ...placement.topology import DeviceRef
from ..driver_command import DRIVER_MODULE
from ..reconcile.observed import ReplicaSpec

MARK_VARIABLE = "SLIPSTREAM_DEPLOYMENT"
"""What all processes of a deployment have in their environment, with its mark in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What to run for each rank of a pool. ``environment``: in addition to the node's."""

    module: str = DRIVER_MODULE
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOrder:
    """What is told to whoever keeps a rank's process. ``address``: of its node; ``device``: the index there."""

    spec: ReplicaSpec
    rank: int
    address: str
    device: int
    launch: Launch
    ranks_on_host: int = 1
    ranks_per_host: int = 1

    def arguments(self) -> tuple[str, ...]:
        """Return the arguments with this rank's own in their places."""
        own = {
            "{address}": self.address,
            "{rank}": str(self.rank),
            "{replica}": str(self.spec.id),
            "{device}": str(self.device),
            "{ranks_on_host}": str(self.ranks_on_host),
            "{ranks_per_host}": str(self.ranks_per_host),
        }
        return tuple(_filled(argument, own) for argument in self.launch.arguments)


def ranks_per_host(devices: Sequence[DeviceRef]) -> int:
    """Return the size of the largest equal pieces of a replica's ranks, in their order, that are on one node each."""
    return gcd(*(sum(1 for _ in run) for _, run in groupby(devices, key=lambda device: device.node)))


def _filled(argument: str, own: Mapping[str, str]) -> str:
    for mark, value in own.items():
        argument = argument.replace(mark, value)
    return argument
