"""What an operator asks for: pools of replicas, and how patient to be. Values only."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...placement.plan import Constraint, Degrees, Role


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Generation:
    """What a replica was started as; whoever reads the cluster file raises the numbers.

    ``model``: raised when anything that a request's tokens depend on changes: no request uses replicas of two.
    ``cut``: raised when something else changes that a running replica cannot take over, such as its degrees.
    """

    model: int = 1
    cut: int = 1

    def __str__(self) -> str:
        return f"{self.model}.{self.cut}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolWish:
    """One pool as it should be.

    Raises: ValueError naming the field
    """

    name: str
    role: Role
    degrees: Degrees
    replicas: int
    generation: Generation = field(default_factory=Generation)
    constraint: Constraint = field(default_factory=Constraint)

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name: a pool needs one")
        if self.replicas < 0:
            raise ValueError(f"replicas: must be at least 0, got {self.replicas}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """A deployment as it should be; without pools it is to go away.

    ``partial``: what fits is started even if not everything does. Without it a deployment begins whole or not at all;
    once it has served, what can be repaired or added always is. ``cordoned``: nodes that replicas move away from;
    ``leaving``: replicas that others are to replace.

    Raises: ValueError naming the pool that is there twice
    """

    pools: tuple[PoolWish, ...] = ()
    partial: bool = False
    cordoned: frozenset[str] = frozenset()
    leaving: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        names = [pool.name for pool in self.pools]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"pools: two are called {name!r}")

    def pool(self, name: str) -> PoolWish | None:
        """Return a pool, None if it is not wanted."""
        return next((pool for pool in self.pools if pool.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long the controller is patient.

    - ``starting_s``: until all processes of a replica are up. ``loading_s``: from then until a token came out of it.
    - ``drain_s``: that what runs on a replica may take to end, once nothing new is sent to it.
    - ``first_pause_s``, ``longest_pause_s``: before a pool whose replicas fail starts another; doubles each time.
    - ``stable_s``: a replica that lived so long has not failed at starting.
    """

    starting_s: float = 60.0
    loading_s: float = 1800.0
    drain_s: float = 300.0
    first_pause_s: float = 1.0
    longest_pause_s: float = 60.0
    stable_s: float = 60.0
