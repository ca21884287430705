"""What plans are made from, and what comes of it.

Values only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .model_sizes import ModelSizes
from .objectives import Objectives
from .plan import Constraint, Degrees, PoolPlan, Role
from .plan_figures import Figures
from .plan_memory import EngineLimits, MemoryTraits
from .step_cost import Efficiency
from .topology import Topology
from .workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRequest:
    """What is asked for of one pool; ``degrees`` None and ``most`` None leave the choice."""

    name: str
    role: Role
    degrees: Degrees | None = None
    least: int = 1
    most: int | None = None
    constraint: Constraint = field(default_factory=Constraint)
    limits: EngineLimits = field(default_factory=EngineLimits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """All that plans are made from.

    ``alternatives``: sets of pools, one of which is to be chosen. ``efficiencies`` and ``traits``: by type of device,
    where somebody has measured them.
    """

    topology: Topology
    model: ModelSizes
    alternatives: tuple[tuple[PoolRequest, ...], ...]
    workload: Workload
    objectives: Objectives
    efficiencies: Mapping[str, Efficiency] = field(default_factory=dict)
    traits: Mapping[str, MemoryTraits] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedPlan:
    """A plan, and what it is predicted to do."""

    pools: tuple[PoolPlan, ...]
    figures: Figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Plans, the best first; ``refused``: why cuts or pools were left out, each reason once."""

    plans: tuple[RankedPlan, ...]
    refused: tuple[str, ...]
