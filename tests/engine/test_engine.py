"""The engine's loop: running ahead equals the plain loop, and a failing executor hangs nobody."""

from __future__ import annotations

import pytest

from slipstream.runtime.engine.engine import Engine
from slipstream.runtime.engine.scheduler import Scheduler
from slipstream.runtime.messages import StepPlan, StepResult
from slipstream.sdk.errors import EngineError
from slipstream.tests.engine.builders import bench, config, request


def test_running_ahead_gives_the_same_tokens_as_the_plain_loop() -> None:
    results = []
    for ahead in (True, False):
        at = bench(config(num_blocks=10, max_model_len=40), ahead=ahead)
        for number in range(6):
            at.engine.submit(request(str(number), range(number, number + 9), max_tokens=12, seed=number, n=2))
        at.run()
        results.append(at.tokens)
    assert results[0] == results[1]


class FailingExecutor:
    """Fails at a given step, in the way that is asked for."""

    def __init__(self, failure: Exception, at_step: int) -> None:
        self.failure = failure
        self.at_step = at_step
        self.closed = 0

    def submit(self, plan: StepPlan) -> FailingExecutor.Handle:
        return self.Handle(self, plan)

    def close(self) -> None:
        self.closed += 1

    class Handle:
        def __init__(self, executor: FailingExecutor, plan: StepPlan) -> None:
            self.executor, self.plan = executor, plan

        def result(self, timeout: float | None = None) -> StepResult:
            assert timeout is not None, "a wait without a deadline"
            if self.plan.step >= self.executor.at_step:
                raise self.executor.failure
            tokens = self.plan.samples.astype("int32") - 1
            return StepResult(step=self.plan.step, token_ids=tokens, execute_s=0.0)


@pytest.mark.parametrize(
    ("failure", "message"), [(TimeoutError(), "took longer than 5.0 s"), (RuntimeError("no memory"), "no memory")]
)
@pytest.mark.parametrize("ahead", [True, False])
def test_a_failed_step_ends_everything_with_a_clear_error(failure: Exception, message: str, ahead: bool) -> None:
    executor = FailingExecutor(failure, at_step=3)
    engine = Engine(Scheduler(config()), executor, clock=lambda: 0.0, ahead=ahead, step_timeout_s=5.0)
    engine.submit(request("a", range(5), max_tokens=20))
    engine.submit(request("b", range(5), max_tokens=20))
    with pytest.raises(EngineError, match=message):
        for _ in range(10):
            engine.step()
    assert not engine.has_work
    assert engine.scheduler.pool.available == engine.scheduler.pool.num_blocks
    with pytest.raises(EngineError, match=message):
        engine.submit(request("c", [1]))
    with pytest.raises(EngineError, match=message):
        engine.step()
    engine.close()
    engine.close()
    assert executor.closed == 1


def test_close_ends_what_runs_and_can_be_called_twice() -> None:
    executor = FailingExecutor(RuntimeError(), at_step=10**9)
    engine = Engine(Scheduler(config()), executor, clock=lambda: 0.0, ahead=True, step_timeout_s=5.0)
    engine.submit(request("a", range(5), max_tokens=20))
    engine.step()
    engine.close()
    engine.close()
    assert executor.closed == 1 and not engine.has_work
    with pytest.raises(EngineError, match="closed"):
        engine.submit(request("b", [1]))
