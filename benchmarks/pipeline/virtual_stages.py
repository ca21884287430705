"""A pipeline without a model in time that only the figures know: what a step takes on each stage, and when it is done.

Owns the cost of a step and the stages' calendar. Every stage takes steps in order, when the stage before is done with
them; tokens come back after the last. The clock moves when somebody waits for a result, so nothing sleeps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from slipstream.runtime.messages import StepPlan, StepResult

_TOKEN = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """What a step takes on a whole model; a stage has its share of that, and ``overhead_s`` of its own.

    Linear layers take ``read_s`` to read all weights, or ``token_s`` a token where that is longer. Attention of a chunk
    is arithmetic (``attention_ratio`` of a token's for each position of context), a single token's reads the KV cache.
    """

    token_s: float
    read_s: float
    attention_ratio: float
    kv_position_s: float
    overhead_s: float

    def stage_s(self, plan: StepPlan, stages: int) -> float:
        """Return how long each stage works on a step."""
        counts, contexts = plan.counts.astype(np.float64), plan.starts + plan.counts / 2.0
        single = plan.counts == 1
        linear_s = max(self.read_s, self.token_s * float(counts.sum()))
        chunks_s = self.token_s * self.attention_ratio * float((counts * contexts)[~single].sum())
        reading_s = self.kv_position_s * float(contexts[single].sum())
        return (linear_s + chunks_s + reading_s) / stages + self.overhead_s


@dataclass
class VirtualStages:
    """An ``Executor`` whose steps take virtual time; ``now_s`` is its clock.

    Units: planning_s, from a result to the first stage's having the next step
    """

    cost: StepCost
    stages: int
    planning_s: float
    now_s: float = 0.0
    busy: list[list[tuple[float, float]]] = field(default_factory=list)
    on_their_way: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.busy = [[] for _ in range(self.stages)]

    def submit(self, plan: StepPlan) -> VirtualStep:
        """Put a step into the calendar."""
        self.now_s += self.planning_s
        length_s, ready_s = self.cost.stage_s(plan, self.stages), self.now_s
        for calendar in self.busy:
            start_s = max(ready_s, calendar[-1][1] if calendar else 0.0)
            ready_s = start_s + length_s
            calendar.append((start_s, ready_s))
        self.on_their_way.append((self.now_s, ready_s))
        tokens = np.where(plan.samples, np.int32(_TOKEN), np.int32(-1)).astype(np.int32)
        result = StepResult(step=plan.step, token_ids=tokens, execute_s=length_s)
        return VirtualStep(stages=self, result_=result, done_s=ready_s)

    def close(self) -> None:
        """Nothing to free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualStep:
    """A step in the calendar."""

    stages: VirtualStages
    result_: StepResult
    done_s: float

    def result(self, timeout: float | None = None) -> StepResult:
        """Move the clock to the step's end."""
        del timeout
        self.stages.now_s = max(self.stages.now_s, self.done_s)
        return self.result_


def overlap_s(spans: list[tuple[float, float]], window: tuple[float, float]) -> float:
    """Return how much of a window spans that may overlap cover in sum."""
    if not spans:
        return 0.0
    starts, ends = np.array(spans).T
    return float(np.clip(np.minimum(ends, window[1]) - np.maximum(starts, window[0]), 0.0, None).sum())
