"""The scheduler's decisions: facts in, plan out."""

from __future__ import annotations

import numpy as np
import pytest

from slipstream.runtime.engine.scheduler import Scheduler
from slipstream.runtime.messages import FinishReason, StepPlan, StepResult
from slipstream.sdk.errors import InvalidRequest, Overloaded
from slipstream.tests.engine.builders import bench, config, request
from slipstream.tests.fakes.oracle_executor import expected_tokens


def answer(plan: StepPlan, token: int = 5) -> StepResult:
    tokens = np.where(plan.samples, np.int32(token), np.int32(-1)).astype(np.int32)
    return StepResult(step=plan.step, token_ids=tokens, execute_s=0.0)


def next_plan(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule(0.0)
    assert plan is not None
    return plan


def rows(plan: StepPlan) -> list[tuple[int, int, int]]:
    """Return (slot, start, count) of every row."""
    return list(zip(plan.slots.tolist(), plan.starts.tolist(), plan.counts.tolist(), strict=True))


def test_a_decode_is_never_stalled_by_a_long_prompt() -> None:
    scheduler = Scheduler(config(max_num_batched_tokens=8))
    scheduler.submit(request("short", [1, 2], max_tokens=20))
    plan = next_plan(scheduler)
    scheduler.update(plan, answer(plan))
    scheduler.submit(request("long", range(30), max_tokens=4))
    for chunk in range(4):
        plan = next_plan(scheduler)
        # One token for the decode, the rest of the budget for the prompt.
        assert rows(plan)[0] == (0, 2 + chunk, 1)
        assert rows(plan)[1] == (1, 7 * chunk, 7)
        scheduler.update(plan, answer(plan))
    plan = next_plan(scheduler)
    assert rows(plan)[1] == (1, 28, 2) and plan.samples.tolist() == [True, True]


def test_the_threshold_bounds_a_prompts_share_of_a_step() -> None:
    scheduler = Scheduler(config(long_prefill_token_threshold=5))
    scheduler.submit(request("a", range(12)))
    scheduler.submit(request("b", range(12)))
    assert rows(next_plan(scheduler)) == [(0, 0, 5), (1, 0, 5)]


def test_a_step_can_be_planned_before_the_last_ones_tokens_are_known() -> None:
    scheduler = Scheduler(config())
    scheduler.submit(request("a", [1, 2, 3], max_tokens=3))
    first, second = next_plan(scheduler), next_plan(scheduler)
    assert rows(second) == [(0, 3, 1)]
    third = next_plan(scheduler)
    # Three tokens are on their way: there is nothing more to compute.
    assert scheduler.schedule(0.0) is None
    for plan in (first, second, third):
        outputs = scheduler.update(plan, answer(plan))
        assert outputs.token_ids == [5]
    assert [sequence.request_id for sequence in outputs.finished] == ["a"]


def test_a_stop_token_ends_a_sequence_and_what_was_planned_beyond_is_dropped() -> None:
    scheduler = Scheduler(config())
    scheduler.submit(request("a", [1, 2, 3], max_tokens=9, stop_ids=(8, 5)))
    first, second = next_plan(scheduler), next_plan(scheduler)
    outputs = scheduler.update(first, answer(first))
    assert outputs.finished[0].stop_token_id == 5
    scheduler.submit(request("b", [7, 7], max_tokens=2))
    third = next_plan(scheduler)
    late = scheduler.update(second, answer(second))
    assert late.token_ids == [] and late.finished == []
    assert scheduler.update(third, answer(third)).token_ids == [5]
    scheduler.check_integrity()


def test_priority_goes_before_arrival_and_the_lowest_is_preempted_first() -> None:
    # 6 blocks of 4: two sequences of 12 tokens fit, three do not.
    at = bench(config(num_blocks=6, max_model_len=24, scheduling_policy="priority"), ahead=False)
    at.engine.submit(request("low", range(8), max_tokens=8, priority=2))
    at.step()
    at.engine.submit(request("high", range(40, 48), max_tokens=8, priority=0))
    at.engine.submit(request("mid", range(20, 28), max_tokens=8, priority=1))
    at.run()
    assert [name.split("/")[0] for name in at.finished] == ["high", "mid", "low"]
    assert any("preempted" in event for _, event in at.scheduler.story("low"))
    assert not any("preempted" in event for _, event in at.scheduler.story("high"))
    assert at.tokens["low", 0] == expected_tokens(range(8), 0, 8)


def test_first_come_first_served() -> None:
    at = bench(config(max_num_seqs=1))
    for name in "abc":
        at.engine.submit(request(name, [ord(name) % 90], priority=-ord(name)))
    at.run()
    assert at.finished == ["a/0", "b/0", "c/0"]


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("length", [1, 4, 5, 7, 8, 9])
def test_samples_share_the_prompts_blocks_and_copy_the_last(length: int, ahead: bool) -> None:
    at = bench(config(enable_prefix_caching=False), ahead=ahead)
    prompt = list(range(length))
    at.engine.submit(request("a", prompt, n=3, max_tokens=6, seed=9))
    at.run()
    # The prompt once, its last token once more for each further sample, and five fed-back tokens of three samples.
    assert at.oracle.computed_tokens == length + 2 + 3 * 5
    assert len({tuple(at.tokens["a", index]) for index in range(3)}) == 3
    assert at.tokens["a", 0] == expected_tokens(prompt, 9, 6)


def test_samples_do_not_lose_the_prompt_when_the_first_one_ends_at_once() -> None:
    at = bench(config(), ahead=False)
    at.engine.submit(request("a", range(9), n=4, max_tokens=1))
    at.run()
    assert sorted(at.finished) == ["a/0", "a/1", "a/2", "a/3"]


def test_the_prefix_cache_saves_what_is_shared_and_nothing_else() -> None:
    at = bench(config())
    at.engine.submit(request("a", range(10), max_tokens=2))
    at.run()
    before = at.oracle.computed_tokens
    at.engine.submit(request("b", [*range(8), 50, 51], max_tokens=1))
    at.run()
    assert at.oracle.computed_tokens - before == 2
    before = at.oracle.computed_tokens
    # A prompt that is cached whole still computes its last token, in a copy of the last block.
    at.engine.submit(request("c", range(8), max_tokens=1))
    at.run()
    assert at.oracle.computed_tokens - before == 1


def test_generated_tokens_are_reused_by_the_next_turn() -> None:
    at = bench(config())
    at.engine.submit(request("turn 1", range(6), max_tokens=7))
    at.run()
    conversation = [*range(6), *at.tokens["turn 1", 0], 3, 4]
    before = at.oracle.computed_tokens
    at.engine.submit(request("turn 2", conversation, max_tokens=1))
    at.run()
    # Twelve tokens, three full blocks, were computed in the first turn (its last token never was).
    assert at.oracle.computed_tokens - before == len(conversation) - 12


def test_tenants_do_not_see_each_others_prefixes() -> None:
    at = bench(config())
    for name, salt in [("a", None), ("b", "tenant"), ("c", "tenant")]:
        before = at.oracle.computed_tokens
        at.engine.submit(request(name, range(12), max_tokens=1, cache_salt=salt))
        at.run()
        assert at.oracle.computed_tokens - before == (1 if name == "c" else 12)


def test_prompt_logprobs_compute_the_whole_prompt() -> None:
    at = bench(config())
    for name in "ab":
        before = at.oracle.computed_tokens
        at.engine.submit(request(name, range(12), max_tokens=1, prompt_logprobs=0))
        at.run()
        assert at.oracle.computed_tokens - before == 12


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (request("x", []), "prompt"),
        (request("x", range(64), max_tokens=1), "prompt"),
        (request("x", range(60), max_tokens=5), "max_tokens"),
        (request("x", [1], n=9), "n"),
    ],
)
def test_what_can_never_fit_is_refused_by_name(asked, field: str) -> None:
    scheduler = Scheduler(config())
    with pytest.raises(InvalidRequest) as refused:
        scheduler.submit(asked)
    assert refused.value.field == field
    assert not scheduler.has_work and scheduler.schedule(0.0) is None


def test_a_request_id_is_used_once_at_a_time() -> None:
    at = bench(config())
    at.engine.submit(request("a", [1]))
    with pytest.raises(InvalidRequest, match="in use"):
        at.engine.submit(request("a", [1]))
    at.run()
    at.engine.submit(request("a", [1]))


def test_the_queue_is_bounded() -> None:
    scheduler = Scheduler(config(max_queued_requests=2))
    scheduler.submit(request("a", [1]))
    scheduler.submit(request("b", [1]))
    with pytest.raises(Overloaded):
        scheduler.submit(request("c", [1]))
    assert scheduler.queue_room == 0
    scheduler.schedule(0.0)
    scheduler.submit(request("c", [1]))


def test_aborting_frees_at_once_and_twice_is_nothing() -> None:
    at = bench(config())
    at.engine.submit(request("a", range(20), n=3, max_tokens=9))
    at.step()
    assert at.engine.abort("a")
    assert not at.engine.abort("a") and not at.engine.abort("never seen")
    assert at.scheduler.pool.available == at.scheduler.pool.num_blocks
    at.run()
    assert at.finished == []


def test_the_queue_forgets_what_was_aborted_while_it_waited() -> None:
    at = bench(config(max_num_seqs=1, max_queued_requests=100_000))
    at.engine.submit(request("first", [1], max_tokens=40))
    at.step()
    for number in range(5000):
        at.engine.submit(request(str(number), [2]))
        at.engine.abort(str(number))
    assert at.scheduler.load.waiting == 0
    assert len(at.scheduler._waiting._heap) < 200


@pytest.mark.parametrize("ahead", [True, False])
def test_a_sequence_without_valid_logits_fails_and_the_others_go_on(ahead: bool) -> None:
    scheduler = Scheduler(config())
    scheduler.submit(request("bad", [1, 2, 3], max_tokens=9))
    scheduler.submit(request("good", [1, 2, 3], max_tokens=2))
    first = next_plan(scheduler)
    second = next_plan(scheduler) if ahead else None
    drawn = answer(first)
    broken = StepResult(step=1, token_ids=drawn.token_ids, execute_s=0.0, invalid_rows=(0,))
    outputs = scheduler.update(first, broken)
    assert [(s.request_id, s.finish_reason) for s in outputs.finished] == [("bad", FinishReason.ERROR)]
    assert [s.request_id for s in outputs.sequences] == ["good"]
    last = second or next_plan(scheduler)
    outputs = scheduler.update(last, answer(last))
    assert [s.request_id for s in outputs.finished] == ["good"]
    scheduler.check_integrity()
