"""Drives the scheduler and an executor: one call, one step.

``step`` reads as the loop it is: plan, run, take in. With ``ahead`` the next step is planned and handed over while
the last one still computes, so that planning costs no time; ``ahead=False`` is the plain loop, kept for ablation and
for finding faults. Both give the same tokens.

Not thread-safe: one thread owns an engine. On a request's way: between the front end and the executor.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from ...sdk.errors import EngineError
from ..clock import Clock
from ..messages import EngineRequest, StageTime, StepPlan, StepResult
from .outputs import StepOutputs
from .scheduler import Scheduler
from .sequence import Sequence


class StepHandle(Protocol):
    """A step on its way."""

    def result(self, timeout: float | None = None) -> StepResult:
        """Wait at most ``timeout`` seconds for the result; raise TimeoutError, or what the step raised."""
        ...


class Executor(Protocol):
    """Carries out steps strictly in the order in which they are submitted."""

    def submit(self, plan: StepPlan) -> StepHandle:
        """Take a step; return at once."""
        ...

    def close(self) -> None:
        """Stop and free everything, without waiting for a step that may never end; called once."""
        ...


class Engine:
    """Scheduler and executor as one machine.

    Units: step_timeout_s, seconds a step may take before the engine gives up on its executor
    Raises: EngineError from ``step`` when the executor failed; the engine is dead from then on, and says so.
    """

    def __init__(
        self, scheduler: Scheduler, executor: Executor, *, clock: Clock, ahead: bool, step_timeout_s: float
    ) -> None:
        self.scheduler = scheduler
        self._executor = executor
        self._clock = clock
        self._in_flight: deque[tuple[StepPlan, StepHandle]] = deque()
        # As many steps on their way as micro-batches, the one that is waited for included.
        self._depth = max(int(ahead), scheduler.config.micro_batches - 1)
        self._step_timeout_s = step_timeout_s
        self._stages: dict[int, StageTime] = {}
        self._failure: EngineError | None = None
        self._closed = False

    def submit(self, request: EngineRequest) -> list[Sequence]:
        """Queue a request; see ``Scheduler.submit``."""
        if self._failure is not None:
            raise self._failure
        return self.scheduler.submit(request)

    def abort(self, request_id: str) -> bool:
        """End a request now; return whether it was alive."""
        return self.scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        """Whether another ``step`` can bring anything."""
        return self.scheduler.has_work or bool(self._in_flight)

    @property
    def stage_times(self) -> tuple[StageTime, ...]:
        """What each stage has spent on all steps so far; empty where there is one rank alone."""
        return tuple(self._stages[stage] for stage in sorted(self._stages))

    def step(self) -> StepOutputs:
        """Plan and start a step, take in the oldest result that is due, and return what came out.

        The outputs are empty when the step's result is still on its way (the first step of a run ahead).
        """
        if self._failure is not None:
            raise self._failure
        plan = self.scheduler.schedule(self._clock())
        if plan is not None:
            self._in_flight.append((plan, self._executor.submit(plan)))
        elif not self._in_flight and self.scheduler.has_work:
            raise self._fail(EngineError(f"nothing can be scheduled: {self.scheduler.load}"), None)
        if not self._in_flight or (plan is not None and len(self._in_flight) <= self._depth):
            return StepOutputs()
        return self._take_in(*self._in_flight.popleft())

    def _take_in(self, plan: StepPlan, handle: StepHandle) -> StepOutputs:
        try:
            result = handle.result(timeout=self._step_timeout_s)
        except TimeoutError as error:
            problem = f"step {plan.step} took longer than {self._step_timeout_s} s"
            raise self._fail(EngineError(problem), error) from error
        except EngineError as error:
            raise self._fail(EngineError(f"step {plan.step} failed: {error}"), error) from error
        except Exception as error:
            raise self._fail(EngineError(f"step {plan.step} failed: {error!r}"), error) from error
        for time in result.stages:
            before = self._stages.get(time.stage)
            self._stages[time.stage] = time if before is None else before.plus(time)
        return self.scheduler.update(plan, result)

    def _fail(self, failure: EngineError, cause: BaseException | None) -> EngineError:
        """Remember why the engine is dead, and end every request, so that nothing waits for ever."""
        failure.__cause__ = cause
        self._failure = failure
        self._in_flight.clear()
        for request_id in self.scheduler.live_request_ids:
            self.scheduler.abort(request_id)
        return failure

    def close(self) -> None:
        """End every request, wait for the steps in flight, and close the executor. Closing twice does nothing.

        Raises: EngineError when one of those steps fails; the executor is closed all the same.
        """
        if self._closed:
            return
        self._closed = True
        for request_id in self.scheduler.live_request_ids:
            self.scheduler.abort(request_id)
        in_flight, self._in_flight = self._in_flight, deque()
        try:
            for plan, handle in in_flight:
                self._take_in(plan, handle)
        finally:
            self._failure = self._failure or EngineError("the engine is closed")
            self._executor.close()
