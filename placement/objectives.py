"""What a plan is chosen for: one figure that is made as good as can be, and bounds on the others.

Values only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Goal(StrEnum):
    """The figure by which plans are ranked.

    Throughput is tokens a second of the whole cluster; cost and power are per token.
    """

    THROUGHPUT = "throughput"
    COST = "cost"
    POWER = "power"
    TIME_TO_FIRST_TOKEN = "time_to_first_token"
    TIME_PER_TOKEN = "time_per_token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    """The goal, and what a plan has to keep to; None is no bound.

    ``quantile``: the share of requests that have to keep the bound on the first token.

    Units: cost_per_hour in the currency of the device table
    Raises: ValueError naming the bound that is not above 0
    """

    goal: Goal = Goal.THROUGHPUT
    time_to_first_token_s: float | None = None
    time_per_token_s: float | None = None
    cost_per_hour: float | None = None
    power_w: float | None = None
    quantile: float = 0.9

    def __post_init__(self) -> None:
        for name in ("time_to_first_token_s", "time_per_token_s", "cost_per_hour", "power_w"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile must be between 0 and 1, got {self.quantile}")
