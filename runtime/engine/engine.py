"""Drives the scheduler and an executor: one call, one step.

``step`` reads as the loop it is: plan, run, take in. With ``ahead`` the next step is planned and handed over while
the last one still computes, so that planning costs no time; ``ahead=False`` is the plain loop, kept for ablation and
for finding faults. Both give the same tokens.

One thread steps an engine. Others may use it, its scheduler and all that its scheduler calls while they hold ``lock``,
which no step holds while it computes. On a request's way: between the front end and the executor.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

from ...sdk.errors import EngineError
from ..clock import Clock
from ..lock import engine_lock
from ..messages import EngineRequest, StageTime, StepPlan, StepResult
from .outputs import StepOutputs
from .rates import StepRates
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


class _InFlight(NamedTuple):
    plan: StepPlan
    handle: StepHandle
    submitted_s: float


class Engine:
    """Scheduler and executor as one machine.

    ``lock``: held around everything that touches scheduler, blocks or the machines of transfers; ``rates``: of recent
    steps. Units: step_timeout_s, seconds a step may take before the engine gives up on its executor
    Raises: EngineError from ``step`` when the executor failed; the engine is dead from then on, and says so.
    """

    def __init__(
        self, scheduler: Scheduler, executor: Executor, *, clock: Clock, ahead: bool, step_timeout_s: float
    ) -> None:
        self.scheduler = scheduler
        self.lock = engine_lock()
        self.rates = StepRates()
        self._executor = executor
        self._clock = clock
        self._in_flight: deque[_InFlight] = deque()
        # As many steps on their way as micro-batches, the one that is waited for included.
        self._depth = max(int(ahead), scheduler.config.micro_batches - 1)
        self._step_timeout_s = step_timeout_s
        self._stages: dict[int, StageTime] = {}
        self._failure: EngineError | None = None
        self._stalled = False
        self._closed = False

    def submit(self, request: EngineRequest, *, send: object | None = None) -> list[Sequence]:
        """Queue a request; see ``Scheduler.submit``."""
        if self._failure is not None:
            raise self._failure
        with self.lock:
            return self.scheduler.submit(request, send=send)

    def abort(self, request_id: str) -> bool:
        """End a request now; return whether it was alive."""
        with self.lock:
            return self.scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        """Whether another ``step`` can bring anything."""
        return self.scheduler.has_work or bool(self._in_flight)

    @property
    def is_stalled(self) -> bool:
        """Whether the last ``step`` found nothing to compute because blocks are on loan: until one of those comes back
        or is adopted, another step brings nothing.
        """
        return self._stalled

    @property
    def stage_times(self) -> tuple[StageTime, ...]:
        """What each stage has spent on all steps so far; empty where there is one rank alone."""
        return tuple(self._stages[stage] for stage in sorted(self._stages))

    def step(self) -> StepOutputs:
        """Plan and start a step, take in the oldest result that is due, and return what came out.

        The outputs are empty when the step's result is still on its way (the first step of a run ahead), or nothing can
        be computed before a loan comes back (``is_stalled``).
        """
        if self._failure is not None:
            raise self._failure
        with self.lock:
            plan = self._plan()
        if plan is not None:
            submitted_s = self._clock()
            self._in_flight.append(_InFlight(plan, self._executor.submit(plan), submitted_s))
        due = self._in_flight and (plan is None or len(self._in_flight) > self._depth)
        outputs = self._take_in(self._in_flight.popleft()) if due else StepOutputs()
        with self.lock:
            self.scheduler.take_adoptions(outputs)
        return outputs

    def _plan(self) -> StepPlan | None:
        scheduler = self.scheduler
        plan = scheduler.schedule(self._clock())
        self._stalled = False
        if plan is None and not self._in_flight and scheduler.has_sequences:
            # The first may have done nothing but take blocks from a sequence that cannot go on.
            plan = scheduler.schedule(self._clock())
            self._stalled = plan is None
            if self._stalled and not scheduler.loans:
                raise self._fail(EngineError(f"nothing can be scheduled: {scheduler.load}"), None)
        return plan

    def _take_in(self, step: _InFlight) -> StepOutputs:
        plan = step.plan
        try:
            result = step.handle.result(timeout=self._step_timeout_s)
        except TimeoutError as error:
            problem = f"step {plan.step} took longer than {self._step_timeout_s} s"
            raise self._fail(EngineError(problem), error) from error
        except EngineError as error:
            raise self._fail(EngineError(f"step {plan.step} failed: {error}"), error) from error
        except Exception as error:
            raise self._fail(EngineError(f"step {plan.step} failed: {error!r}"), error) from error
        self.rates.note(plan, submitted_s=step.submitted_s, done_s=self._clock())
        for time in result.stages:
            before = self._stages.get(time.stage)
            self._stages[time.stage] = time if before is None else before.plus(time)
        with self.lock:
            return self.scheduler.update(plan, result)

    def _fail(self, failure: EngineError, cause: BaseException | None) -> EngineError:
        """Remember why the engine is dead, and end every request, so that nothing waits for ever."""
        failure.__cause__ = cause
        self._failure = failure
        self._in_flight.clear()
        self._abort_all()
        return failure

    def _abort_all(self) -> None:
        with self.lock:
            for request_id in self.scheduler.live_request_ids:
                self.scheduler.abort(request_id)

    def close(self) -> None:
        """End every request, wait for the steps in flight, and close the executor. Closing twice does nothing.

        Raises: EngineError when one of those steps fails; the executor is closed all the same.
        """
        if self._closed:
            return
        self._closed = True
        self._abort_all()
        in_flight, self._in_flight = self._in_flight, deque()
        try:
            for step in in_flight:
                self._take_in(step)
        finally:
            self._failure = self._failure or EngineError("the engine is closed")
            self._executor.close()
