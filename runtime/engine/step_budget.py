"""What one step may still take while it is being planned: tokens, and work where steps are to be even.

What it has taken already stands in the slot table, so that a preempted row gives its part back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np

from ..config import SchedulerConfig
from ..messages import Int32Array, StepPlan
from .even_steps import EvenSteps
from .slots import SlotTable


class StepBudget:
    """Budgets of the steps that are planned one after the other.

    ``begin`` comes before a step is planned, ``planned`` after it.
    """

    def __init__(self, config: SchedulerConfig, table: SlotTable) -> None:
        self._table = table
        self._max_tokens = config.max_num_batched_tokens
        self._threshold = config.long_prefill_token_threshold
        self._even: EvenSteps | None = None
        if config.even_chunks:
            self._even = EvenSteps(
                attention_ratio=config.attention_ratio,
                max_tokens=config.max_num_batched_tokens,
                block_size=config.block_size,
                steps=config.micro_batches,
            )
        self._asked: tuple[Int32Array, Int32Array, Iterable[int]]
        self._share: float | None = None
        self._has_chunk = False
        self._chunks: deque[float] = deque(maxlen=0 if self._even is None else self._even.spread - 1)

    def begin(self, order: Int32Array, lacking: Int32Array, waiting: Iterable[int]) -> None:
        """Begin a step. Its share of all that could join the pipeline now is worked out once a prompt asks for it.

        Shapes: order, lacking [rows]: running slots, and tokens they lack
        ``waiting``: tokens of sequences that could run too.
        """
        if self._even is None:
            return
        self._asked = (order, lacking, waiting)
        self._share = None
        self._has_chunk = False
        if not len(order):
            # Nothing is in the pipeline, and what was does not count.
            self._chunks.clear()

    def _work_of_step(self, even: EvenSteps) -> float:
        if self._share is None:
            self._share = self._work_out_share(even, *self._asked)
        return self._share

    def _work_out_share(self, even: EvenSteps, order: Int32Array, lacking: Int32Array, waiting: Iterable[int]) -> float:
        work = even.work(self._table.computed[order], lacking)
        chunks = float(work[lacking > 1].sum()) + sum(self._chunks)
        tokens = iter(waiting)
        while chunks < even.enough and (count := next(tokens, 0)):
            chunks += count * (1.0 + even.attention_ratio * count / 2.0)
        return even.share(float(work[lacking == 1].sum()), chunks)

    def is_full(self) -> bool:
        """Whether the step has no token left for anything."""
        return self._tokens_left() <= 0

    def _tokens_left(self) -> int:
        return self._max_tokens - int(self._table.planned.sum())

    def chunk(self, start: int, lacking: int) -> int:
        """Return how many of the tokens that a prompt lacks go into the step; 0 when it is full."""
        limit = min(lacking, self._tokens_left())
        if self._threshold:
            limit = min(limit, self._threshold)
        if self._even is None or limit <= 0:
            return max(0, limit)
        table = self._table
        slots = np.flatnonzero(table.planned)
        taken = float(self._even.work(table.computed[slots], table.planned[slots]).sum())
        count = self._even.chunk(start, limit, work=self._work_of_step(self._even) - taken)
        if not count and not self._has_chunk:
            count = self._even.least_chunk(start, limit)
        self._has_chunk |= count > 0
        return count

    def planned(self, plan: StepPlan) -> None:
        """Note what a step has taken of prompts."""
        if self._even is None:
            return
        work = 0.0
        if self._has_chunk:
            chunks = plan.counts > 1
            work = float(self._even.work(plan.starts[chunks], plan.counts[chunks]).sum())
        self._chunks.append(work)
