"""An engine without a model, for whoever wants to measure or test what stands around one."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from ..clock import Clock
from ..config import SchedulerConfig
from ..engine.engine import Engine, Executor, StepHandle
from ..engine.scheduler import Scheduler
from ..messages import StepPlan, StepResult
from .null_executor import NullExecutor

_BLOCK_SIZE = 16
_MAX_BLOCKS = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class NullEngineOptions:
    """What an engine without a model pretends to be.

    Units: step_time_s, seconds that each step seems to compute (see ``PacedExecutor``); 0 answers at once
    """

    vocab_size: int = 32_000
    max_model_len: int = 8192
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_queued_requests: int = 4096
    step_time_s: float = 0.0


def launch_null_engine(options: NullEngineOptions, *, clock: Clock) -> Engine:
    """Start an engine whose tokens depend on seed and position alone (see ``null_tokens``).

    Raises: ConfigError naming the option
    """
    blocks = -(-options.max_model_len // _BLOCK_SIZE) * options.max_num_seqs
    config = SchedulerConfig(
        max_model_len=options.max_model_len,
        num_blocks=min(max(blocks, 1), _MAX_BLOCKS),
        block_size=_BLOCK_SIZE,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=max(options.max_num_batched_tokens, options.max_num_seqs),
        max_queued_requests=options.max_queued_requests,
    )
    executor: Executor = NullExecutor(max_slots=options.max_num_seqs, vocab_size=options.vocab_size)
    if options.step_time_s > 0:
        executor = PacedExecutor(executor, clock=clock, step_time_s=options.step_time_s)
    return Engine(Scheduler(config), executor, clock=clock, ahead=True, step_timeout_s=60.0)


class PacedExecutor:
    """An executor whose steps take ``step_time_s`` seconds each, one after the other, as a device's do.

    Steps end when the clock shows a whole multiple of ``step_time_s``: who reads the same clock in another process can
    tell when a token was drawn. A step that was submitted too late for its turn ends one multiple later.
    """

    def __init__(self, executor: Executor, *, clock: Clock, step_time_s: float) -> None:
        self._executor = executor
        self._clock = clock
        self._step_time_s = step_time_s
        self._last_end = 0  # in multiples of the step time
        self._closed = threading.Event()

    def submit(self, plan: StepPlan) -> StepHandle:
        """Start a step when those before have ended."""
        self._last_end = max(int(self._clock() / self._step_time_s), self._last_end) + 1
        ends_s = self._last_end * self._step_time_s
        return _PacedStep(self._executor.submit(plan), ends_s, self._clock, self._closed)

    def close(self) -> None:
        """Close the executor; steps that still wait end at once."""
        self._closed.set()
        self._executor.close()


class _PacedStep:
    def __init__(self, handle: StepHandle, ready_s: float, clock: Clock, closed: threading.Event) -> None:
        self._handle = handle
        self._ready_s = ready_s
        self._clock = clock
        self._closed = closed

    def result(self, timeout: float | None = None) -> StepResult:
        wait_s = self._ready_s - self._clock()
        if timeout is not None and wait_s > timeout:
            raise TimeoutError
        if wait_s > 0:
            self._closed.wait(wait_s)
        return self._handle.result(timeout)
