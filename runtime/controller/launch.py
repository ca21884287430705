"""How the process of a rank is started, as a value that travels: a module and its arguments.

``{address}``, ``{rank}``, ``{replica}`` and ``{device}`` in arguments stand for the rank's own: its node's address, its
number, its replica's name, its device's index on the node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..reconcile.observed import ReplicaSpec

RANK_MODULE = "slipstream.runtime.worker.main"


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What to run for each rank of a pool. ``environment``: in addition to the node's."""

    module: str = RANK_MODULE
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

    def arguments(self) -> tuple[str, ...]:
        """Return the arguments with this rank's own in their places."""
        own = {
            "{address}": self.address,
            "{rank}": str(self.rank),
            "{replica}": str(self.spec.id),
            "{device}": str(self.device),
        }
        return tuple(_filled(argument, own) for argument in self.launch.arguments)


def _filled(argument: str, own: Mapping[str, str]) -> str:
    for mark, value in own.items():
        argument = argument.replace(mark, value)
    return argument
