"""Wrappers around an executor: one whose steps wait for the test's permission, one that adds log-probabilities."""

from __future__ import annotations

import threading

import numpy as np

from slipstream.runtime.engine.engine import Executor, StepHandle
from slipstream.runtime.messages import StepPlan, StepResult, TokenLogprobs
from slipstream.sdk.params import SamplingParams


class Gate:
    """Lets steps through: all of them while it is open, else as many as were allowed."""

    def __init__(self, *, is_open: bool = True) -> None:
        self._condition = threading.Condition()
        self._open = is_open
        self._permits = 0
        self._failure: Exception | None = None

    def open(self) -> None:
        with self._condition:
            self._open = True
            self._condition.notify_all()

    def close(self) -> None:
        with self._condition:
            self._open = False

    def allow(self, steps: int) -> None:
        with self._condition:
            self._permits += steps
            self._condition.notify_all()

    def fail(self, error: Exception) -> None:
        """Let the step that waits, and every later one, fail."""
        with self._condition:
            self._failure = error
            self._condition.notify_all()

    def pass_through(self, timeout_s: float | None) -> None:
        with self._condition:
            ready = self._condition.wait_for(lambda: self._open or self._permits or self._failure, timeout_s)
            if self._failure is not None:
                raise self._failure
            if not ready:
                raise TimeoutError
            if not self._open:
                self._permits -= 1


class GatedExecutor:
    """An executor whose results are there when the gate lets them through."""

    def __init__(self, executor: Executor, gate: Gate) -> None:
        self._executor = executor
        self._gate = gate

    def submit(self, plan: StepPlan) -> StepHandle:
        return _GatedStep(self._executor.submit(plan), self._gate)

    def close(self) -> None:
        self._executor.close()


class _GatedStep:
    def __init__(self, handle: StepHandle, gate: Gate) -> None:
        self._handle = handle
        self._gate = gate

    def result(self, timeout: float | None = None) -> StepResult:
        self._gate.pass_through(timeout)
        return self._handle.result(timeout)


def score(token_id: int, position: int, k: int) -> TokenLogprobs:
    """Return the log-probabilities that ``ScoringExecutor`` gives a token at a position."""
    return TokenLogprobs(
        token_ids=np.array([token_id, *range(k)], dtype=np.int32),
        logprobs=-np.arange(1 + k, dtype=np.float32) - np.float32(position) / 8,
        rank=1 + token_id % 5,
    )


class ScoringExecutor:
    """Adds log-probabilities that can be foretold to the results of an executor that answers at once."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._params: dict[int, SamplingParams] = {}
        self._prompts: dict[int, np.ndarray] = {}

    def submit(self, plan: StepPlan) -> StepHandle:
        for admitted in plan.admitted:
            self._params[admitted.slot] = admitted.params
            wanted = admitted.prompt_length if admitted.wants_prompt_logprobs else 0
            self._prompts[admitted.slot] = admitted.token_ids[:wanted]
        result = self._executor.submit(plan).result(0)
        ends = plan.starts + plan.counts
        for row, slot in enumerate(plan.slots.tolist()):
            params, end = self._params[slot], int(ends[row])
            if params.logprobs is not None and plan.samples[row]:
                result.logprobs[row] = score(int(result.token_ids[row]), end, params.logprobs)
            scored = range(int(plan.starts[row]) + 1, min(end + 1, len(self._prompts[slot])))
            if params.prompt_logprobs is not None and scored:
                k, prompt = params.prompt_logprobs, self._prompts[slot]
                result.prompt_logprobs[row] = tuple(score(int(prompt[place]), place, k) for place in scored)
        return _Ready(result)

    def close(self) -> None:
        self._executor.close()


class _Ready:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self, timeout: float | None = None) -> StepResult:
        del timeout
        return self._result
