"""An executor without a model whose tokens prove that scheduling and block bookkeeping were right.

Its "KV" of a position is a digest of every token up to there. A step reads the KV of its context through the block
table, exactly where attention would, and the token it draws is a function of what it read: a wrong block, a missed
copy, a stale prefix or a write into somebody else's block changes the tokens that come out. ``expected_tokens`` says
what must come out, from the prompt alone.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence

import numpy as np

from slipstream.runtime.messages import StepPlan, StepResult

VOCABULARY = 97


def _digest(previous: int, token: int, position: int) -> int:
    data = f"{previous},{token},{position}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "little")


def _draw(digest: int, seed: int) -> int:
    return _digest(digest, seed, -1) % VOCABULARY


def expected_tokens(prompt: Sequence[int], seed: int, count: int, stop_ids: Sequence[int] = ()) -> list[int]:
    """Return what a sequence must generate: up to ``count`` tokens, ending with the first stop id."""
    digest = 0
    for position, token in enumerate(prompt):
        digest = _digest(digest, int(token), position)
    out: list[int] = []
    while len(out) < count:
        out.append(_draw(digest, seed))
        if out[-1] in stop_ids:
            break
        digest = _digest(digest, out[-1], len(prompt) + len(out) - 1)
    return out


class OracleExecutor:
    """Runs each plan at once, in order, and checks as it goes that every block it reads holds the right positions."""

    def __init__(self, *, num_blocks: int, block_size: int, max_slots: int, max_length: int) -> None:
        self.block_size = block_size
        self.kv = np.zeros((num_blocks, block_size), dtype=np.int64)
        self.tokens = np.zeros((max_slots, max_length), dtype=np.int64)
        self.table = np.full((max_slots, -(-max_length // block_size)), -1, dtype=np.int64)
        self.seeds = [0] * max_slots
        self.known = [0] * max_slots
        self.computed_tokens = 0
        self.closed = False

    def submit(self, plan: StepPlan) -> ReadyStep | LateStep:
        return ReadyStep(self.compute(plan))

    def compute(self, plan: StepPlan) -> StepResult:
        """Carry out a step."""
        for source, target in zip(plan.copy_sources, plan.copy_targets, strict=True):
            self.kv[target] = self.kv[source]
        for admitted in plan.admitted:
            slot = admitted.slot
            self.tokens[slot] = -1
            self.tokens[slot, : len(admitted.token_ids)] = admitted.token_ids
            self.known[slot] = len(admitted.token_ids)
            self.table[slot] = -1
            self.table[slot, : len(admitted.block_ids)] = admitted.block_ids
            self.seeds[slot] = admitted.seed
        self.table[plan.block_slots, plan.block_indices] = plan.block_ids
        drawn = np.full(len(plan.slots), -1, dtype=np.int32)
        for row in range(len(plan.slots)):
            drawn[row] = self._run_row(plan, row)
        return StepResult(step=plan.step, token_ids=drawn, execute_s=0.0)

    def _run_row(self, plan: StepPlan, row: int) -> int:
        slot, start, count = int(plan.slots[row]), int(plan.starts[row]), int(plan.counts[row])
        digest = 0 if start == 0 else int(self.kv[self._place(slot, start - 1)])
        for position in range(start, start + count):
            token = int(self.tokens[slot, position])
            assert token >= 0, f"slot {slot} has no token at position {position}"
            digest = _digest(digest, token, position)
            self.kv[self._place(slot, position)] = digest
        self.computed_tokens += count
        if not plan.samples[row]:
            return -1
        token = _draw(digest, self.seeds[slot])
        if start + count < self.tokens.shape[1]:
            self.tokens[slot, start + count] = token
        return token

    def _place(self, slot: int, position: int) -> tuple[int, int]:
        block = int(self.table[slot, position // self.block_size])
        assert block >= 0, f"slot {slot} has no block for position {position}"
        return block, position % self.block_size

    def close(self) -> None:
        self.closed = True


class ReadyStep:
    """A step whose result is there."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self, timeout: float | None = None) -> StepResult:
        del timeout
        return self._result


class LateOracleExecutor(OracleExecutor):
    """Computes a step when its result is asked for, as late as an executor may: whoever touches blocks that a step on
    its way still reads or writes is found out by wrong tokens.
    """

    def __init__(self, *, num_blocks: int, block_size: int, max_slots: int, max_length: int) -> None:
        super().__init__(num_blocks=num_blocks, block_size=block_size, max_slots=max_slots, max_length=max_length)
        self._queued: deque[LateStep] = deque()

    def submit(self, plan: StepPlan) -> LateStep:
        step = LateStep(self, plan)
        self._queued.append(step)
        return step

    def run_until(self, last: LateStep) -> None:
        """Compute the steps that were submitted, in order, up to this one."""
        while last.done is None:
            step = self._queued.popleft()
            step.done = self.compute(step.plan)


class LateStep:
    """A step of a ``LateOracleExecutor``."""

    def __init__(self, executor: LateOracleExecutor, plan: StepPlan) -> None:
        self.plan = plan
        self.done: StepResult | None = None
        self._executor = executor

    def result(self, timeout: float | None = None) -> StepResult:
        del timeout
        self._executor.run_until(self)
        assert self.done is not None
        return self.done
