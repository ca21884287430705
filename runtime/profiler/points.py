"""Which steps are measured, and the plans that make a rank carry them out.

Owns the choice of sizes and the making of plans: a step of the wanted form without an engine around it. The cache is
filled by computing one long sequence and copying its blocks, because memory that was never written reads too fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...sdk.params import SamplingParams
from ..messages import AdmittedSequence, SequenceId, StepPlan

DECODE_BATCHES = (1, 2, 4, 8, 16, 24, 32, 64)
DECODE_CONTEXTS = (32, 256, 1024, 4096)
PREFILL_TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
PREFILL_CHUNKS = (128, 512)
PREFILL_CONTEXTS = (256, 1024, 4096)

_TOKEN = 7
"""What every prompt is made of; what it says makes no difference to the time."""

_GREEDY = SamplingParams(temperature=0.0, max_tokens=1 << 20)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPoint:
    """A step: ``tokens`` of one prompt behind ``context`` positions, or ``batch`` rows that decode behind them."""

    tokens: int = 0
    context: int = 0
    batch: int = 0

    @property
    def positions(self) -> int:
        """Positions of KV that the step's sequences have together when it has run."""
        return max(1, self.batch) * (self.context + max(1, self.tokens))


def table_points(*, longest: int, positions: int, most_batch: int) -> tuple[StepPoint, ...]:
    """Return the steps to measure on a model of that length with room for so many positions."""
    decode = [StepPoint(batch=batch, context=context) for batch in DECODE_BATCHES for context in DECODE_CONTEXTS]
    prefill = [StepPoint(tokens=tokens) for tokens in PREFILL_TOKENS]
    prefill += [StepPoint(tokens=tokens, context=context) for tokens in PREFILL_CHUNKS for context in PREFILL_CONTEXTS]
    return tuple(
        point
        for point in (*prefill, *decode)
        if point.context + max(2, point.tokens + 1) <= longest
        and point.positions + 1 <= positions
        and point.batch <= most_batch
    )


class PlanWriter:
    """Writes numbered plans for one rank; block 0 and up hold the long sequence, the rest is for copies of it."""

    def __init__(self, *, block_size: int, num_blocks: int) -> None:
        """Take the size of the rank's cache."""
        self._block_size = block_size
        self._num_blocks = num_blocks
        self._step = 0

    def fill(self, tokens: int, *, chunk: int) -> list[StepPlan]:
        """Return the plans that compute one sequence from block 0 on, and then copy its blocks to all others."""
        blocks = -(-tokens // self._block_size)
        admitted = self._sequence(0, tokens, range(blocks))
        plans = []
        for start in range(0, tokens, chunk):
            count = min(chunk, tokens - start)
            plans.append(self._plan([admitted] if start == 0 else [], [0], [start], [count]))
        targets = np.arange(blocks, self._num_blocks, dtype=np.int32)
        # A step computes something: the last token once more.
        plans.append(self._plan([], [0], [tokens - 1], [1], copies=((targets % blocks).astype(np.int32), targets)))
        return plans

    def plan(self, point: StepPoint, *, first: bool) -> StepPlan:
        """Return a plan for a step; the first one of a point admits its sequences."""
        rows = max(1, point.batch)
        count = max(1, point.tokens)
        blocks = -(-(point.context + count + 1) // self._block_size)
        admitted = [
            # Blocks from the end, so that the long sequence stays as it is for later fills.
            self._sequence(
                slot,
                point.context + count,
                [(self._num_blocks - 1 - slot * blocks - index) % self._num_blocks for index in range(blocks)],
            )
            for slot in range(rows)
        ]
        return self._plan(admitted if first else [], list(range(rows)), [point.context] * rows, [count] * rows)

    def _sequence(self, slot: int, tokens: int, blocks: Sequence[int]) -> AdmittedSequence:
        return AdmittedSequence(
            slot=slot,
            sequence_id=SequenceId(slot),
            token_ids=np.full(tokens, _TOKEN, dtype=np.int32),
            prompt_length=tokens,
            block_ids=np.array(list(blocks), dtype=np.int32),
            params=_GREEDY,
            stop_ids=(),
            seed=0,
        )

    def _plan(
        self,
        admitted: Sequence[AdmittedSequence],
        slots: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
        *,
        copies: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> StepPlan:
        self._step += 1
        none = np.zeros(0, dtype=np.int32)
        sources, targets = copies or (none, none)
        return StepPlan(
            step=self._step,
            admitted=tuple(admitted),
            slots=np.array(slots, dtype=np.int32),
            sequence_ids=np.array(slots, dtype=np.int64),
            starts=np.array(starts, dtype=np.int32),
            counts=np.array(counts, dtype=np.int32),
            samples=np.ones(len(slots), dtype=np.bool_),
            block_slots=none,
            block_indices=none,
            block_ids=none,
            copy_sources=sources,
            copy_targets=targets,
        )
