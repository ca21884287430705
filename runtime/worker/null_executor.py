"""An executor without a model: draws tokens from an integer hash at once.

Measures what everything around the model costs, and stands in for a model where only the machinery is of interest
(benchmarks of scheduler and gateway). Its tokens depend on seed and position alone, so they can be foretold.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..messages import StepPlan, StepResult

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def null_tokens(seeds: NDArray[np.uint64], positions: NDArray[np.uint64], vocab_size: int) -> NDArray[np.int32]:
    """Return the tokens that stand at these positions for these seeds.

    Shapes: seeds, positions [rows]; result [rows] int32 in [0, vocab_size)
    """
    mixed = (seeds ^ (positions * _MULTIPLIER)) * _MULTIPLIER
    return ((mixed >> np.uint64(33)) % np.uint64(vocab_size)).astype(np.int32)


class ReadyStep:
    """A step whose result is there already."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self, timeout: float | None = None) -> StepResult:
        """Return the result; never waits."""
        del timeout
        return self._result


class NullExecutor:
    """Answers every step at once.

    Units: vocab_size, tokens
    """

    def __init__(self, *, max_slots: int, vocab_size: int) -> None:
        self._seeds = np.zeros(max_slots, dtype=np.uint64)
        self._vocab_size = vocab_size

    def submit(self, plan: StepPlan) -> ReadyStep:
        """Draw a token for every row that samples."""
        for admitted in plan.admitted:
            self._seeds[admitted.slot] = admitted.seed
        ends = (plan.starts + plan.counts).astype(np.uint64)
        drawn = null_tokens(self._seeds[plan.slots], ends, self._vocab_size)
        tokens = np.where(plan.samples, drawn, np.int32(-1)).astype(np.int32)
        return ReadyStep(StepResult(step=plan.step, token_ids=tokens, execute_s=0.0))

    def close(self) -> None:
        """Nothing to free."""
