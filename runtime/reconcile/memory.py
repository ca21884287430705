"""What the controller keeps from round to round; losing it costs patience, never correctness.

Deadlines and pauses start over when it is lost. Everything else is seen anew in every round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .desired import Generation, Limits
from .observed import ReplicaId


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """What was noted about a replica.

    Units: born_s, when it was first seen; up_s, when all its processes were first up; drain_s, when it was first to
    take no more requests
    """

    born_s: float
    nodes: frozenset[str]
    generation: Generation
    up_s: float | None = None
    drain_s: float | None = None
    stopping: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """How a pool's starts have failed of late: the pause after the last one doubles each time, up to a bound."""

    generation: Generation
    failures: int
    last_s: float

    def until_s(self, limits: Limits) -> float:
        """Return when another start may be tried."""
        # The exponent is bounded, so that the product is a number however long a pool fails.
        return self.last_s + min(limits.first_pause_s * 2.0 ** min(self.failures - 1, 60), limits.longest_pause_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Notes about the replicas that were seen last, and about pools that fail."""

    lives: Mapping[ReplicaId, Life] = field(default_factory=dict)
    backoffs: Mapping[str, Backoff] = field(default_factory=dict)
