"""What is done before the first request: which steps, in which order, for how long; an executor notes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from slipstream.kernels import tuning as tunings
from slipstream.kernels.tuning import Tuning
from slipstream.runtime.messages import StepPlan, StepResult
from slipstream.runtime.worker.executor import ModelExecutor
from slipstream.runtime.worker.graphs import DecodeGraphs, bucket_sizes
from slipstream.runtime.worker.warm_up import WarmUp, WarmUpSizes, tuning_for, warm_up

SIZES = WarmUpSizes(most_tokens=100, most_rows=6, longest=300, num_blocks=8, block_size=16)


class Noting:
    """An executor, its graphs and its tuning in one: notes what is asked of it; each step takes a second."""

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []
        self.said: list[str] = []
        self.sizes: tuple[int, ...] = ()
        self.now_s = 0.0
        self.measured = 5

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        self.plans.append(plan)
        self.said.append("step")
        return self._done(StepResult(step=plan.step, token_ids=np.zeros(len(plan.slots), np.int32), execute_s=1.0))

    def call(self, run: Callable[[], Any]) -> Future[Any]:
        return self._done(run())

    def _done(self, result: Any) -> Future[Any]:
        self.now_s += 1
        future: Future[Any] = Future()
        future.set_result(result)
        return future

    @property
    def missing(self) -> tuple[int, ...]:
        return (6, 4, 2, 1)

    def prepare(self, size: int) -> None:
        self.said.append(f"prepare {size}")

    def capture(self, size: int) -> bool:
        self.said.append(f"capture {size}")
        self.sizes = (size, *self.sizes)
        return True

    def save(self) -> None:
        self.said.append("save")


class NotingTuning(Noting):
    """Says when it measures."""

    def measuring(self) -> Any:
        noting = self

        class Measuring:
            def __enter__(self) -> None:
                noting.said.append("(")

            def __exit__(self, *error: object) -> None:
                noting.said.append(")")

        return Measuring()


def run(noting: Noting, *, tuned: bool = False, graphs: bool = True, limit_s: float | None = None) -> WarmUp:
    return warm_up(
        cast(ModelExecutor, noting),
        SIZES,
        clock=lambda: noting.now_s,
        graphs=cast(DecodeGraphs, noting) if graphs else None,
        tuning=cast(Tuning, noting) if tuned else None,
        limit_s=limit_s,
    )


def test_prompts_then_graphs_then_draws() -> None:
    noting = Noting()
    report = run(noting)
    prompts = [plan for plan in noting.plans if plan.num_tokens > len(plan.slots)]
    assert [plan.num_tokens for plan in prompts] == [9, 16, 25, 32, 57, 64, 100]
    drawn = noting.plans[len(prompts) :]
    assert sorted({len(plan.slots) for plan in drawn}) == list(bucket_sizes(6))
    kinds = [sequence.params for plan in drawn for sequence in plan.admitted]
    assert {params.temperature for params in kinds} == {0.0, 0.8}
    assert any(params.top_p < 1 for params in kinds) and any(params.repetition_penalty != 1 for params in kinds)
    captured = [f"{what} {size}" for size in (6, 4, 2, 1) for what in ("prepare", "capture")]
    assert noting.said == ["step"] * len(prompts) + captured + ["step"] * len(drawn)
    assert report.graphs == (1, 2, 4, 6) and report.is_whole
    assert report.steps == len(noting.plans) + 4 and report.seconds == noting.now_s


def test_plans_are_such_as_a_scheduler_makes() -> None:
    noting = Noting()
    run(noting, graphs=False)
    for plan in noting.plans:
        assert (plan.starts + plan.counts < SIZES.longest).all() and len(plan.slots) <= SIZES.most_rows
        for admitted, count in zip(plan.admitted, plan.counts, strict=True):
            assert len(admitted.block_ids) == -(-int(count) // SIZES.block_size)
            assert len(set(admitted.block_ids.tolist())) == len(admitted.block_ids)
            assert admitted.block_ids.min() >= 0 and admitted.block_ids.max() < SIZES.num_blocks


def test_nothing_is_measured_while_a_graph_is_captured() -> None:
    noting = NotingTuning()
    report = run(noting, tuned=True)
    said = "".join(each if each in "()" else each[0] for each in noting.said)
    assert "(p)c" in said and "(c" not in said and said.endswith(")s")
    assert report.measured == 5


def test_it_ends_when_its_time_is_over(caplog: pytest.LogCaptureFixture) -> None:
    noting = Noting()
    report = run(noting, limit_s=8.5)
    assert not report.is_whole and report.steps == 8 and report.seconds == 9.0
    assert "warm-up took 9.0 s: 8 steps, 1 graphs, 0 kernels measured; there was no time for the rest" in caplog.text


@pytest.fixture
def _no_tuning_stays() -> Iterator[None]:
    yield
    tunings.use_tuning(None)


@pytest.mark.usefixtures("_no_tuning_stays")
def test_configurations_are_chosen_by_measurements_of_gpus_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert tuning_for(torch.device("cpu"), deterministic=False) is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("slipstream.runtime.worker.warm_up.device_name", lambda device: "a GPU")
    gpu = torch.device("cuda", 0)
    assert tuning_for(gpu, deterministic=True) is None
    assert isinstance(tuning_for(gpu, deterministic=False), Tuning)
