"""A plan: which pools of replicas a deployment has, how each replica is cut, and on which device each rank runs.

Values only. ``placement`` makes plans; the controller carries them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from .topology import DeviceRef, Node


class Role(StrEnum):
    """What the replicas of a pool do with a request."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """How a replica is cut; the number of its ranks is the product.

    Ranks count with tp fastest, then ep, then pp. ``experts_over_tp``: experts are spread over the tp ranks.

    Raises: ValueError naming the degree that is below 1
    """

    pp: int = 1
    ep: int = 1
    tp: int = 1
    experts_over_tp: bool = False

    def __post_init__(self) -> None:
        for axis in ("pp", "ep", "tp"):
            if getattr(self, axis) < 1:
                raise ValueError(f"{axis} must be at least 1, got {getattr(self, axis)}")

    @property
    def ranks(self) -> int:
        """The ranks, and so the devices, of a replica."""
        return self.pp * self.ep * self.tp


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """On which devices a pool may run.

    ``device_types``: the types allowed, any if empty. ``labels``: what a node's labels must say. ``nodes``: the names
    of the nodes allowed, any if empty. ``spread``: the label whose values replicas of the pool are spread over, so that
    a failure of one domain takes as few as can be.
    """

    device_types: frozenset[str] = frozenset()
    labels: Mapping[str, str] = field(default_factory=dict)
    spread: str | None = None
    nodes: frozenset[str] = frozenset()

    def allows(self, node: Node) -> bool:
        """Say whether the pool may run on a node."""
        return (
            (not self.device_types or node.device_type in self.device_types)
            and (not self.nodes or node.name in self.nodes)
            and all(node.labels.get(label) == value for label, value in self.labels.items())
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPlace:
    """Where the ranks of one replica run, in the order of ranks."""

    devices: tuple[DeviceRef, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPlan:
    """One pool: its role, the cut that all its replicas share, and their places."""

    name: str
    role: Role
    degrees: Degrees
    replicas: tuple[ReplicaPlace, ...]
    constraint: Constraint = field(default_factory=Constraint)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """Why a replica cannot be placed: what is missing, and where.

    ``why`` is a sentence for the operator: the resource, how much is needed, how much there is, on which nodes.
    """

    pool: str
    needed: int
    found: int
    why: str
