"""KV that goes to another replica or comes from one: who owns which blocks, from when on, and what comes out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from slipstream.runtime.engine.kv_blocks import KvBlockPool, Owner
from slipstream.runtime.engine.loans import Loans
from slipstream.runtime.engine.scheduler import Scheduler
from slipstream.runtime.engine.sequence import Sequence, SequenceState
from slipstream.runtime.messages import FinishReason, StepPlan, StepResult, TokenLogprobs
from slipstream.sdk.errors import InvalidRequest
from slipstream.tests.engine.builders import bench, config, request
from slipstream.tests.fakes.oracle_executor import expected_tokens


class Carrier:
    """Gives every transfer a number, and notes what it is told."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses = refuses
        self.started: list[tuple[int, str, list[int]]] = []
        self.stopped: list[int] = []

    def start(self, sequence: Sequence) -> int | None:
        if self.refuses:
            return None
        number = 40 + len(self.started)
        self.started.append((number, sequence.request_id, list(sequence.blocks)))
        return number

    def stop(self, number: int) -> None:
        self.stopped.append(number)


def answer(plan: StepPlan, token: int = 5) -> StepResult:
    tokens = np.where(plan.samples, np.int32(token), np.int32(-1)).astype(np.int32)
    return StepResult(step=plan.step, token_ids=tokens, execute_s=0.0)


def next_plan(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule(0.0)
    assert plan is not None
    scheduler.check_integrity()
    return plan


def do_step(scheduler: Scheduler, token: int = 5) -> StepPlan:
    plan = next_plan(scheduler)
    scheduler.update(plan, answer(plan, token))
    scheduler.check_integrity()
    return plan


def sent(plan: StepPlan) -> list[tuple[int, int]]:
    """Return (slot, transfer) of every row that is sent."""
    slots = plan.slots[plan.sending_rows].tolist()
    return list(zip(slots, plan.sending_transfers.tolist(), strict=True))


def sending_scheduler(**options: Any) -> tuple[Scheduler, Carrier]:
    carrier = Carrier()
    return Scheduler(config(max_num_batched_tokens=8, **options), sending=carrier), carrier


# ------------------------------------------------------------------ what goes


def test_a_prompt_is_sent_chunk_by_chunk_and_its_blocks_outlive_it() -> None:
    scheduler, carrier = sending_scheduler()
    [sequence] = scheduler.submit(request("sent", range(18), max_tokens=1), send="over there")
    scheduler.submit(request("own", [1, 2], max_tokens=1))
    first = do_step(scheduler)
    assert sent(first) == [(0, 40)] and sequence.transfer == 40
    assert carrier.started == [(40, "sent", scheduler.loans.blocks(("out", 40)))]
    while sequence.state is not SequenceState.FINISHED:
        plan = do_step(scheduler)
        assert sent(plan) == [(0, 40)]
    assert sequence.finish_reason is FinishReason.LENGTH and sequence.transfer == 40
    assert len(scheduler.loans.blocks(("out", 40))) == 5 and carrier.stopped == []
    while scheduler.has_work:
        assert sent(do_step(scheduler)) == []
    assert scheduler.pool.available == scheduler.pool.num_blocks - 5
    scheduler.release_sent(40)
    assert scheduler.pool.available == scheduler.pool.num_blocks
    scheduler.check_integrity()


def test_a_prefix_that_is_cached_is_the_transfers_too() -> None:
    scheduler, _ = sending_scheduler()
    scheduler.submit(request("before", range(8), max_tokens=1))
    do_step(scheduler)
    scheduler.submit(request("sent", [*range(8), 50, 51], max_tokens=1), send=True)
    plan = do_step(scheduler)
    assert plan.starts.tolist() == [8] and len(scheduler.loans.blocks(("out", 40))) == 3
    scheduler.release_sent(40)
    scheduler.check_integrity()


@pytest.mark.parametrize("way", ["abort", "invalid"])
def test_a_sequence_that_ends_before_its_token_ends_its_transfer_but_not_its_hold(way: str) -> None:
    scheduler, carrier = sending_scheduler()
    [sequence] = scheduler.submit(request("sent", range(18), max_tokens=1), send=True)
    plan = next_plan(scheduler)
    if way == "abort":
        scheduler.abort("sent")
    else:
        failed = StepResult(step=1, token_ids=np.array([-1], np.int32), execute_s=0.0, invalid_rows=(0,))
        scheduler.update(plan, failed)
    assert carrier.stopped == [40] and sequence.transfer is None
    assert scheduler.pool.available == scheduler.pool.num_blocks - 2
    scheduler.release_sent(40)
    assert scheduler.pool.available == scheduler.pool.num_blocks


def test_a_preempted_sequence_asks_for_another_transfer() -> None:
    # Two prompts of 4 blocks begin side by side in 6.
    scheduler, carrier = sending_scheduler(num_blocks=6, max_model_len=24, long_prefill_token_threshold=4)
    scheduler.submit(request("a", range(15), max_tokens=9))
    scheduler.submit(request("b", range(30, 45), max_tokens=1), send=True)
    while not carrier.stopped:
        plan = scheduler.schedule(0.0)
        if plan is not None:
            scheduler.update(plan, answer(plan))
    # The other one only waits: the blocks are on their way back.
    assert len(carrier.started) == 1 and scheduler.load.preemptions == 1
    assert scheduler.schedule(0.0) is None and scheduler.load.running == 1
    scheduler.release_sent(40)
    while len(carrier.started) == 1:
        do_step(scheduler)
    assert [name for _, name, _ in carrier.started] == ["b", "b"]
    while scheduler.has_work:
        do_step(scheduler)
    scheduler.release_sent(41)
    assert carrier.stopped == [40] and scheduler.pool.available == 6


def test_a_transfer_that_is_over_early_leaves_its_sequence_alone() -> None:
    scheduler, carrier = sending_scheduler()
    [sequence] = scheduler.submit(request("sent", range(18), max_tokens=1), send=True)
    do_step(scheduler)
    scheduler.release_sent(40)
    scheduler.check_integrity()
    while scheduler.has_work:
        assert sent(do_step(scheduler)) == []
    assert sequence.finish_reason is FinishReason.LENGTH and carrier.stopped == []


def test_what_nobody_carries_is_computed_all_the_same() -> None:
    for carrier in (None, Carrier(refuses=True)):
        scheduler = Scheduler(config(), sending=carrier)
        [sequence] = scheduler.submit(request("sent", range(6), max_tokens=1), send=True)
        assert sent(do_step(scheduler)) == []
        assert sequence.transfer is None and sequence.finish_reason is FinishReason.LENGTH


def test_only_one_sample_without_scores_can_be_sent() -> None:
    scheduler, _ = sending_scheduler()
    for asked, field in [(request("x", [1], n=2), "n"), (request("x", [1, 2], prompt_logprobs=1), "prompt_logprobs")]:
        with pytest.raises(InvalidRequest) as refused:
            scheduler.submit(asked, send=True)
        assert refused.value.field == field
        scheduler.check_fits(asked)


def test_a_step_that_sends_nothing_says_nothing_of_it() -> None:
    scheduler, _ = sending_scheduler()
    scheduler.submit(request("own", range(6), max_tokens=3))
    plans = [next_plan(scheduler) for _ in range(3)]
    assert all(plan.sending_rows.dtype == np.int32 and not len(plan.sending_rows) for plan in plans)
    assert plans[0].sending_transfers is plans[1].sending_transfers, "made once"


# ------------------------------------------------------------------ what comes


def fill(kv: Any, prompt: list[int], blocks: list[int], block_size: int, first: int) -> None:
    """Write the oracle's KV of a prompt, from a position on, as another replica would."""
    other = bench(config(block_size=block_size), ahead=False)
    other.engine.submit(request("elsewhere", prompt, max_tokens=1))
    other.step()
    table = other.oracle.table[0]
    for position in range(first, len(prompt)):
        at, offset = position // block_size, position % block_size
        kv[blocks[at], offset] = other.oracle.kv[table[at], offset]


@pytest.mark.parametrize("length", [1, 7, 8, 9])
@pytest.mark.parametrize("ahead", [True, False])
def test_what_was_computed_elsewhere_goes_on_here(length: int, ahead: bool) -> None:
    at, prompt = bench(config(), ahead=ahead), list(range(length))
    asked = request("a", prompt, max_tokens=6, seed=3)
    want = expected_tokens(prompt, 3, 6)
    lent = at.scheduler.lend(asked, "key")
    assert lent is not None and lent[1] == 0 and len(lent[0]) == -(-length // 4)
    fill(at.oracle.kv, prompt, lent[0], 4, 0)
    logprobs = TokenLogprobs(token_ids=np.array([want[0]], np.int32), logprobs=np.zeros(1, np.float32), rank=1)
    [sequence] = at.scheduler.adopt(asked, "key", want[0], logprobs)
    at.scheduler.return_loan("key")
    at.scheduler.check_integrity()
    outputs = at.step()
    assert outputs.sequences[0] is sequence and outputs.logprobs[0] is logprobs
    at.run()
    assert at.tokens["a", 0] == want and at.finished == ["a/0"]
    assert at.oracle.computed_tokens == 5, "what had come was computed again"
    assert at.scheduler.pool.available == at.scheduler.pool.num_blocks


def test_what_is_cached_here_is_lent_shared_but_not_the_last_tokens_block() -> None:
    at, prompt = bench(config()), list(range(12))
    at.engine.submit(request("before", prompt, max_tokens=1))
    at.run()
    for asked, cached in [(prompt, 8), ([*prompt, 1], 12), ([*prompt[:9], 77], 8), ([9, *prompt], 0)]:
        lent = at.scheduler.lend(request("a", asked), "key")
        assert lent is not None and lent[1] == cached
        assert all(len(at.scheduler.pool.owners(block)) == 2 for block in lent[0][: cached // 4])
        at.scheduler.check_integrity()
        at.scheduler.return_loan("key")
    at.scheduler.check_integrity()


def test_adopted_blocks_are_cached_for_those_that_come_after() -> None:
    at, prompt = bench(config()), list(range(10))
    asked = request("a", prompt, max_tokens=2, seed=1)
    lent = at.scheduler.lend(asked, "key")
    assert lent is not None
    fill(at.oracle.kv, prompt, lent[0], 4, 0)
    at.scheduler.adopt(asked, "key", expected_tokens(prompt, 1, 1)[0])
    at.scheduler.return_loan("key")
    at.run()
    before = at.oracle.computed_tokens
    at.engine.submit(request("b", prompt, max_tokens=3, seed=2))
    at.run()
    assert at.tokens["b", 0] == expected_tokens(prompt, 2, 3) and at.oracle.computed_tokens - before == 2 + 2


@pytest.mark.parametrize(("max_tokens", "stop_ids"), [(1, ()), (5, (7,))])
def test_a_token_that_ends_the_request_comes_out_with_its_ending(max_tokens: int, stop_ids: tuple[int, ...]) -> None:
    at = bench(config())
    asked = request("a", range(5), max_tokens=max_tokens, stop_ids=stop_ids)
    assert at.scheduler.lend(asked, "key") is not None
    [sequence] = at.scheduler.adopt(asked, "key", 7)
    at.scheduler.return_loan("key")
    assert at.engine.has_work
    at.run()
    assert at.tokens["a", 0] == [7] and at.finished == ["a/0"] and at.steps == 1
    assert sequence.stop_token_id == (7 if stop_ids else None)
    assert at.scheduler.pool.available == at.scheduler.pool.num_blocks


def test_blocks_that_a_step_on_its_way_still_touches_are_not_lent() -> None:
    scheduler = Scheduler(config(num_blocks=4, max_model_len=16, enable_prefix_caching=False))
    scheduler.submit(request("a", range(13), max_tokens=3, stop_ids=(5,)))
    first, second = next_plan(scheduler), next_plan(scheduler)
    assert second.starts.tolist() == [13]
    scheduler.update(first, answer(first, 5))
    assert scheduler.pool.available == 4, "it has ended; the second step still writes its position 13"
    asked = request("b", range(8), max_tokens=2)
    assert scheduler.lend(asked, "key") is None and not scheduler.loans
    scheduler.update(second, answer(second))
    assert scheduler.lend(asked, "key") is not None
    scheduler.check_integrity()


def test_cached_blocks_that_a_planned_copy_reads_are_not_lent() -> None:
    scheduler = Scheduler(config(num_blocks=4, max_model_len=16))
    scheduler.submit(request("a", range(8), max_tokens=1))
    do_step(scheduler)
    scheduler.submit(request("b", range(8), max_tokens=1))
    plan = next_plan(scheduler)
    [source] = plan.copy_sources.tolist()
    scheduler.abort("b")
    lent = scheduler.lend(request("c", range(50, 60), max_tokens=2), "key")
    assert lent is None or source not in lent[0]
    scheduler.update(plan, answer(plan))
    assert scheduler.lend(request("d", range(60, 74), max_tokens=2), "other") is not None


def test_lending_leaves_room_for_those_that_run_and_were_interrupted() -> None:
    scheduler = Scheduler(config(num_blocks=8, max_model_len=32, max_num_batched_tokens=16))
    scheduler.submit(request("a", range(8), max_tokens=4))
    do_step(scheduler)
    # Two blocks are the sequence's, one more is left for it.
    assert scheduler.lend(request("b", range(30, 54), max_tokens=2), "key") is None
    assert scheduler.lend(request("b", range(30, 50), max_tokens=2), "key") is not None
    assert scheduler.lend(request("c", [1], max_tokens=2), "other") is None
    while scheduler.has_work:
        do_step(scheduler)
    assert scheduler.lend(request("c", [1], max_tokens=2), "other") is not None


def test_a_request_fits_a_loan_or_never_does() -> None:
    scheduler = Scheduler(config(num_blocks=16, max_model_len=64))
    assert scheduler.fits_loan(request("a", range(63), max_tokens=1))
    assert not scheduler.fits_loan(request("a", range(64), max_tokens=1))
    assert not scheduler.fits_loan(request("a", range(8), max_tokens=2, generated=([1, 2],)))


def test_adopted_sequences_wait_with_their_blocks_and_go_before_others() -> None:
    at = bench(config(max_num_seqs=1), ahead=False)
    at.engine.submit(request("runs", range(4), max_tokens=4))
    at.step()
    at.engine.submit(request("waits", range(20, 24), max_tokens=2))
    asked, prompt = request("adopted", range(40, 46), max_tokens=3, seed=2), list(range(40, 46))
    lent = at.scheduler.lend(asked, "key")
    assert lent is not None
    fill(at.oracle.kv, prompt, lent[0], 4, 0)
    [sequence] = at.scheduler.adopt(asked, "key", expected_tokens(prompt, 2, 1)[0])
    at.scheduler.return_loan("key")
    assert sequence.state is SequenceState.ADOPTED and at.scheduler.load.waiting == 2
    at.run()
    assert at.finished == ["runs/0", "adopted/0", "waits/0"]
    assert at.tokens["adopted", 0] == expected_tokens(prompt, 2, 3)


def test_an_adopted_sequence_that_is_aborted_gives_its_blocks_back() -> None:
    at = bench(config(max_num_seqs=1), ahead=False)
    at.engine.submit(request("runs", range(4), max_tokens=3))
    at.step()
    asked = request("adopted", range(40, 46), max_tokens=3)
    assert at.scheduler.lend(asked, "key") is not None
    at.scheduler.adopt(asked, "key", 1)
    assert at.engine.abort("adopted")
    at.scheduler.check_integrity()
    at.scheduler.return_loan("key")
    at.run()
    assert at.finished == ["runs/0"] and at.scheduler.pool.available == at.scheduler.pool.num_blocks


def test_adopted_sequences_that_lack_a_block_each_do_not_wait_for_one_another() -> None:
    # Each holds two full blocks of four, and its next token needs a third.
    at = bench(config(num_blocks=4, max_model_len=16), ahead=False)
    prompts, asks = [list(range(8)), list(range(30, 38))], []
    for name, prompt in zip("ab", prompts, strict=True):
        asked = request(name, prompt, max_tokens=4)
        lent = at.scheduler.lend(asked, name)
        assert lent is not None
        fill(at.oracle.kv, prompt, lent[0], 4, 0)
        asks.append(asked)
    for asked, prompt in zip(asks, prompts, strict=True):
        at.scheduler.adopt(asked, asked.request_id, expected_tokens(prompt, 0, 1)[0])
        at.scheduler.return_loan(asked.request_id)
    at.run()
    assert sorted(at.finished) == ["a/0", "b/0"]
    for name, prompt in zip("ab", prompts, strict=True):
        assert at.tokens[name, 0] == expected_tokens(prompt, 0, 4)


def test_an_engine_whose_blocks_are_on_loan_waits_and_says_so() -> None:
    at = bench(config(num_blocks=4, max_model_len=16), ahead=False)
    assert at.scheduler.lend(request("other", range(12), max_tokens=2), "key") is not None
    at.engine.submit(request("a", range(10), max_tokens=3))
    for _ in range(3):
        assert at.step().sequences == [] and at.engine.is_stalled and at.engine.has_work
    at.scheduler.return_loan("key")
    at.step()
    assert not at.engine.is_stalled
    at.run()
    assert at.tokens["a", 0] == expected_tokens(range(10), 0, 3)


def test_a_loan_is_an_owner_of_its_own() -> None:
    pool = KvBlockPool(4)
    loans = Loans(pool)
    blocks = pool.allocate(2, Owner(1))
    assert blocks is not None
    loans.hold("a", blocks)
    assert loans.take("a", 1, settled_step=0) is not None and loans.take("b", 1, settled_step=0) is not None
    assert loans.take("c", 1, settled_step=0) is None
    loans.release("c")
    pool.release(blocks, Owner(1))
    assert pool.available == 0 and len(loans) == 2 and "a" in loans and loans.blocks("a")[:2] == blocks
    owners = list(loans.holders())
    assert len(set(owners)) == 2 and max(owners) < -1
    loans.release("a")
    assert pool.available == 3
    with pytest.raises(KeyError):
        loans.release("a")
    loans.release("b")
    pool.check_integrity()


# ------------------------------------------------------------------ what was drawn elsewhere


@pytest.mark.parametrize("caching", [True, False])
def test_samples_go_on_after_what_was_drawn_elsewhere(caching: bool) -> None:
    whole, prompt = bench(config()), [3, 1, 4, 1, 5]
    whole.engine.submit(request("a", prompt, n=4, max_tokens=8, seed=11))
    whole.run()
    want = [whole.tokens["a", index] for index in range(4)]
    at = bench(config(enable_prefix_caching=caching))
    asked = request("a", prompt, n=4, max_tokens=8, seed=11, generated=(None, want[1][:3], [], want[3][:7]))
    sequences = at.engine.submit(asked)
    assert [sequence.state for sequence in sequences] == [
        SequenceState.FINISHED, SequenceState.WAITING, SequenceState.HELD, SequenceState.HELD
    ]  # fmt: skip
    at.run()
    assert [at.tokens["a", index] for index in range(4)] == [[], want[1][3:], want[2], want[3][7:]]
    assert sorted(at.finished) == ["a/1", "a/2", "a/3"]


@pytest.mark.parametrize("generated", [([1, 2],), ([1, 2], [1, 2, 3, 4]), (None, None), ([1, 9], []), (None, [1], [2])])
def test_what_was_drawn_elsewhere_and_cannot_go_on_is_refused_by_name(generated: Any) -> None:
    scheduler = Scheduler(config())
    with pytest.raises(InvalidRequest) as refused:
        scheduler.submit(request("a", [1], n=2, max_tokens=4, stop_ids=(9,), generated=generated))
    assert refused.value.field == "generated" and not scheduler.has_work


def test_queued_tokens_are_those_whose_kv_is_still_to_come() -> None:
    scheduler = Scheduler(config(max_num_batched_tokens=8))
    assert scheduler.load.queued_tokens == 0
    scheduler.submit(request("a", range(20), max_tokens=3))
    scheduler.submit(request("b", range(6), max_tokens=3))
    assert scheduler.load.queued_tokens == 26
    do_step(scheduler)
    # Of a's twelve that are left, the one that a step which decodes lacks too is not counted.
    assert scheduler.load.queued_tokens == 11 + 6
    scheduler.abort("b")
    assert scheduler.load.queued_tokens == 11
    do_step(scheduler)
    do_step(scheduler)
    assert scheduler.load.queued_tokens == 0
    scheduler.abort("a")
    assert scheduler.load.queued_tokens == 0
