"""Even steps: chunks and steps that take equally long, prompts that always get on, and stages that stand idle less."""

from __future__ import annotations

import numpy as np
import pytest

from slipstream.benchmarks.pipeline.conversations import SAMPLE, read_conversations
from slipstream.benchmarks.pipeline.run import Figures, Run
from slipstream.benchmarks.pipeline.virtual_stages import StepCost, VirtualStages
from slipstream.runtime.config import SchedulerConfig
from slipstream.runtime.engine.even_steps import EvenSteps
from slipstream.runtime.engine.scheduler import Scheduler
from slipstream.runtime.messages import StepPlan, StepResult
from slipstream.sdk.errors import ConfigError
from slipstream.tests.engine.builders import bench, config, request

RATIO = 1e-3


def even(*, ratio: float = RATIO, max_tokens: int = 2048, block_size: int = 16, steps: int = 4) -> EvenSteps:
    return EvenSteps(attention_ratio=ratio, max_tokens=max_tokens, block_size=block_size, steps=steps)


def work_of(plan: StepPlan, ratio: float = RATIO) -> float:
    return float((plan.counts * (1 + ratio * (plan.starts + plan.counts / 2))).sum())


def plan_and_answer(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule(0.0)
    assert plan is not None
    tokens = np.where(plan.samples, 5, -1).astype(np.int32)
    scheduler.update(plan, StepResult(step=plan.step, token_ids=tokens, execute_s=0.0))
    return plan


def test_the_chunks_of_a_long_prompt_take_equally_long() -> None:
    steps, length, start = even(), 60_000, 0
    chunks: list[int] = []
    while start < length:
        chunks.append(steps.chunk(start, length - start, work=steps.most))
        start += chunks[-1]
    starts = np.cumsum([0, *chunks[:-1]])
    assert chunks[0] == 2048 and chunks == sorted(chunks, reverse=True)
    assert all(int(end) % 16 == 0 for end in starts)
    work = steps.work(starts.astype(np.int32), np.array(chunks, np.int32))
    # A block at the end of the prompt is what rounding can leave out.
    assert (work[:-1] <= steps.most).all()
    assert (work[:-1] > steps.most - 16 * (1 + RATIO * length)).all()


def test_without_attention_chunks_are_the_budget() -> None:
    assert even(ratio=0.0).chunk(4096, 9000, work=2048.0) == 2048
    assert even(ratio=0.0).chunk(4096, 100, work=2048.0) == 100


def test_a_chunk_ends_with_a_block_or_with_its_prompt() -> None:
    steps = even(ratio=0.0)
    assert steps.chunk(5, 1000, work=50.0) == 43  # to position 48
    assert steps.chunk(5, 30, work=50.0) == 30
    assert steps.chunk(5, 1000, work=10.0) == 0
    assert steps.chunk(5, 1000, work=-1.0) == 0
    assert steps.least_chunk(5, 1000) == 11
    assert steps.least_chunk(5, 3) == 3


def test_a_share_is_bounded_both_ways() -> None:
    steps = even(ratio=0.0)
    assert steps.share(400.0, 16_000.0) == 100.0 + 1000.0
    assert steps.share(0.0, 1.0) == 128.0
    assert steps.share(0.0, 1e9) == 2048.0
    assert even(ratio=0.0, max_tokens=8).share(0.0, 1.0) == 2.0


def test_a_prompt_is_spread_over_equal_steps() -> None:
    scheduler = Scheduler(
        config(
            max_model_len=8192, num_blocks=2048, max_num_batched_tokens=2048,
            micro_batches=4, even_chunks=True, attention_ratio=RATIO,
        )
    )  # fmt: skip
    scheduler.submit(request("long", [1] * 8000, max_tokens=2))
    works: list[float] = []
    while scheduler.load.waiting or scheduler.table.computed[0] < 8000:
        plan = scheduler.schedule(0.0)
        assert plan is not None
        works.append(work_of(plan))
    assert len(works) == 17
    # Rounding leaves out less than a block of four tokens, each of at most 9 units.
    assert max(works[:-1]) - min(works[:-1]) < 4 * 9


def test_decodes_count_first_and_chunks_get_what_is_left() -> None:
    ratio = 0.05
    scheduler = Scheduler(
        config(
            max_model_len=512, num_blocks=512, max_num_batched_tokens=64,
            even_chunks=True, attention_ratio=ratio, enable_prefix_caching=False,
        )
    )  # fmt: skip
    most = 64 * (1 + ratio * 32)
    scheduler.submit(request("decoding", range(200), max_tokens=200))
    while int(scheduler.table.computed[0]) < 200:
        plan_and_answer(scheduler)
    scheduler.submit(request("long", [1] * 500, max_tokens=2))
    plan = plan_and_answer(scheduler)
    assert plan.counts.tolist()[0] == 1
    assert most - 4 * (1 + ratio * 64) < work_of(plan, ratio) <= most
    alone = even(ratio=ratio, max_tokens=64, block_size=4).chunk(0, 500, work=most)
    assert 0 < plan.counts[1] < alone == 64


def test_a_prompt_gets_on_though_decodes_take_all_the_time() -> None:
    settings = config(
        max_model_len=160, num_blocks=400, max_num_seqs=8, max_num_batched_tokens=8,
        even_chunks=True, attention_ratio=1.0, enable_prefix_caching=False,
    )  # fmt: skip
    scheduler = Scheduler(settings)
    for number in range(6):
        scheduler.submit(request(str(number), range(40), max_tokens=100))
    while scheduler.load.waiting or (scheduler.table.computed[:6] < 40).any():
        plan_and_answer(scheduler)
    scheduler.submit(request("late", [1] * 40, max_tokens=2))
    before_ends = [plan_and_answer(scheduler) for _ in range(20)]
    assert all(work_of(plan, 1.0) > 8 * (1 + 4) for plan in before_ends)
    chunks = [int(plan.counts[-1]) for plan in before_ends if plan.counts[-1] > 1]
    assert sum(chunks) == 40


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_even_steps_give_the_same_tokens(micro_batches: int) -> None:
    found = []
    for even_chunks in (True, False):
        at = bench(
            config(
                micro_batches=micro_batches, even_chunks=even_chunks, attention_ratio=0.05,
                max_num_batched_tokens=16, num_blocks=40,
            )
        )  # fmt: skip
        for number in range(6):
            at.engine.submit(request(str(number), range(number, number + 40), max_tokens=20, seed=number, n=2))
        at.run()
        found.append((at.tokens, at.steps))
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


def test_a_ratio_that_is_none_is_refused() -> None:
    for ratio in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ConfigError) as refused:
            config(attention_ratio=ratio)
        assert refused.value.field == "attention_ratio"


COST = StepCost(token_s=1e-4, read_s=1e-2, attention_ratio=4e-5, kv_position_s=1e-7, overhead_s=1e-3)


def test_virtual_stages_work_side_by_side_and_in_order() -> None:
    stages = VirtualStages(cost=COST, stages=2, planning_s=0.0)
    scheduler = Scheduler(config(micro_batches=2))
    scheduler.submit(request("a", range(10)))
    scheduler.submit(request("b", range(30)))
    first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
    assert first is not None and second is not None
    handles = [stages.submit(plan) for plan in (first, second)]
    # Both are as short as reading all weights allows.
    length_s = 0.005 + 0.001
    assert handles[0].done_s == pytest.approx(2 * length_s, rel=1e-2)
    assert handles[1].done_s == pytest.approx(3 * length_s, rel=1e-2)
    assert stages.busy[0][1][0] == stages.busy[1][0][0] == stages.busy[0][0][1]
    handles[1].result()
    assert stages.now_s == handles[1].done_s


@pytest.mark.parametrize("rate", [None, 4.0])
def test_stages_stand_idle_less(rate: float | None) -> None:
    conversations = read_conversations(SAMPLE, at_most=120)

    def run(*, even_chunks: bool) -> Figures:
        settings = SchedulerConfig(
            max_model_len=8192, num_blocks=20_000, max_num_seqs=32, micro_batches=4, enable_prefix_caching=False,
            even_chunks=even_chunks, attention_ratio=COST.attention_ratio,
        )  # fmt: skip
        return Run(conversations, settings, COST, stages=4, planning_s=3e-4, rate=rate).figures()

    full, evened = run(even_chunks=False), run(even_chunks=True)
    assert evened.bubble < 0.6 * full.bubble
    assert evened.gap_p99_ms < full.gap_p99_ms
