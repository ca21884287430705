"""Decides, step by step, which tokens of which sequences are computed.

There is no prefill or decode phase: a sequence has ``known`` and ``computed`` tokens, and every step hands tokens out
of one budget, first to sequences that lack one token (decodes), then to prompts in chunks, so that a long prompt never
stalls those that are generating (Sarathi-Serve, arXiv 2403.02310, section 4). When blocks run out, the sequence that
the policy would serve last gives its blocks back and is recomputed later.

Synchronous and pure: results and time come in as arguments, plans go out. A step may be planned before the result
of the one before is known: the token it lacks is then ``pending``, and the executor, which works in order, has it.

Blocks may be on loan: to transfers that carry a sequence's KV away (``kv_sending``), and to those that bring what
another replica has computed, until a sequence adopts it (``kv_lending``).

On a request's way: after admission, before the executor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from ...sdk.errors import InvalidRequest, Overloaded
from ..config import SchedulerConfig
from ..messages import (
    EngineRequest,
    FinishReason,
    Int32Array,
    SequenceId,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from .admission import Admission
from .integrity import check_owners
from .kv_blocks import KvBlockPool, Owner, root_digest
from .kv_lending import KvLending
from .kv_sending import KvSending, SentSequences
from .loans import Loans
from .outputs import SchedulerLoad, StepOutputs
from .policies import POLICIES
from .prefix import publish_full_blocks
from .queues import RunningOrder, WaitingQueue
from .request_limits import check_request, check_single
from .sequence import Sequence, SequenceState, make_sequences
from .slots import SlotTable
from .step_budget import StepBudget
from .step_builder import StepBuilder

_STORY_EVENTS = 20_000

PrefixKey = Callable[[int], str | None]
"""Maps a prompt's length to what else its KV depends on (see ``ModelSpec.prefix_cache_key``)."""


def _no_prefix_key(prompt_length: int) -> str | None:
    del prompt_length
    return None


class Scheduler:
    """Owns every live sequence of an engine, the slot table and the block pool.

    ``sending`` carries KV to other replicas; ``attach`` names it where it needs the scheduler first.

    Raises: InvalidRequest for what can never fit, Overloaded when the queue is full.
    """

    def __init__(
        self, config: SchedulerConfig, *, prefix_key: PrefixKey = _no_prefix_key, sending: KvSending | None = None
    ) -> None:
        self.config = config
        self.pool = KvBlockPool(config.num_blocks, enable_prefix_caching=config.enable_prefix_caching)
        self.table = SlotTable(
            max_slots=config.max_num_seqs, max_length=config.max_model_len, block_size=config.block_size
        )
        self._budget = StepBudget(config, self.table)
        policy = POLICIES[config.scheduling_policy]()
        self._prefix_key = prefix_key
        self.loans = Loans(self.pool)
        self._sent = SentSequences(sending, self.loans, self.table)
        self._lending = KvLending(config, self.pool, self.loans, self._root)
        # What adopting brought since the last step's result.
        self._adoptions = StepOutputs()
        self._requests: dict[str, list[Sequence]] = {}
        self._sequences: dict[SequenceId, Sequence] = {}
        self._waiting = WaitingQueue(policy)
        self._held: dict[SequenceId, list[Sequence]] = {}
        self._running = RunningOrder(policy)
        self._admission = Admission(
            config,
            pool=self.pool,
            table=self.table,
            budget=self._budget,
            waiting=self._waiting,
            running=self._running,
            loans=self.loans,
            lending=self._lending,
            sent=self._sent,
            log=self._log,
        )
        self._next_sequence_id = 1
        self._next_arrival = 0
        self._step = 0
        self._settled_step = 0
        self._preemptions = 0
        self._story: deque[tuple[int, str, str]] = deque(maxlen=_STORY_EVENTS)

    # ------------------------------------------------------------------ requests in, requests out

    def submit(self, request: EngineRequest, *, send: object | None = None) -> list[Sequence]:
        """Queue a request, after refusing what can never be served; return its sequences, finished ones included.

        ``send``: its KV goes to another replica while it is computed, see ``KvSending``; it has one sample then.
        """
        self.check_fits(request, single=send is not None)
        if len(self._waiting) >= self.config.max_queued_requests:
            raise Overloaded(f"{len(self._waiting)} requests are waiting already (max_queued_requests)")
        sequences = make_sequences(
            request,
            first_id=self._next_sequence_id,
            arrival=self._next_arrival,
            root=self._root(request),
            send=send,
        )
        self._next_sequence_id += len(sequences)
        self._next_arrival += 1
        first, *others = live = [sequence for sequence in sequences if sequence.state is not SequenceState.FINISHED]
        self._requests[request.request_id] = live
        self._sequences.update((sequence.sequence_id, sequence) for sequence in live)
        self._enqueue(first, "submitted")
        if others:
            self._held[first.sequence_id] = others
        return sequences

    def check_fits(self, request: EngineRequest, *, single: bool = False) -> None:
        """Raise InvalidRequest for a request that could never be served; ``single``: whose KV is to be handed on."""
        if request.request_id in self._requests:
            raise InvalidRequest("request_id", f"{request.request_id!r} is in use by a request that has not ended")
        check_request(request, self.config)
        if single:
            check_single(request)

    def _root(self, request: EngineRequest) -> bytes:
        return root_digest(request.cache_salt, self._prefix_key(len(request.prompt_token_ids)))

    def abort(self, request_id: str) -> bool:
        """End a request's remaining sequences now; return whether there were any."""
        sequences = list(self._requests.get(request_id, ()))
        for sequence in sequences:
            self.abort_sequence(sequence)
        return bool(sequences)

    def abort_sequence(self, sequence: Sequence) -> None:
        """End one sequence now, whatever it is doing; ending it twice does nothing."""
        if sequence.state is not SequenceState.FINISHED:
            self._finish(sequence, FinishReason.ABORT)

    @property
    def has_work(self) -> bool:
        """Whether any sequence has not ended, or there is news of one."""
        return self.has_sequences or bool(self._adoptions.sequences)

    @property
    def has_sequences(self) -> bool:
        """Whether any sequence has not ended."""
        return bool(self._sequences)

    @property
    def live_request_ids(self) -> list[str]:
        """Requests that have not ended, oldest first."""
        return list(self._requests)

    @property
    def queue_room(self) -> int:
        """How many more requests can be submitted now."""
        return self.config.max_queued_requests - len(self._waiting)

    @property
    def load(self) -> SchedulerLoad:
        """Return how busy the scheduler is."""
        table, order = self.table, self._running.slots
        # Not the one token that those which decode lack: it is there in a step, however many they are.
        lacking = table.known[order] + table.pending[order] - table.computed[order] - 1
        return SchedulerLoad(
            running=len(self._running),
            waiting=len(self._waiting) + len(self._lending.adopted) + sum(len(held) for held in self._held.values()),
            blocks_total=self.pool.num_blocks,
            blocks_available=self.pool.available,
            preemptions=self._preemptions,
            queued_tokens=self._waiting.tokens + int(lacking.clip(min=0).sum()),
        )

    def story(self, request_id: str) -> list[tuple[int, str]]:
        """Return what happened to a request as (step, event), as far back as the log reaches."""
        return [(step, event) for step, who, event in self._story if who == request_id]

    # ------------------------------------------------------------------ KV that comes and goes

    def attach(self, sending: KvSending) -> None:
        """Name who carries KV to other replicas."""
        self._sent.carrier = sending

    def release_sent(self, number: int) -> None:
        """Take a transfer that was sent off its blocks: nobody reads them any longer."""
        self._sent.release(number)

    def fits_loan(self, request: EngineRequest) -> bool:
        """Return whether the KV of a request with one sample fits when nothing else is here."""
        return self._lending.fits(request)

    def lend(self, request: EngineRequest, key: Hashable) -> tuple[list[int], int] | None:
        """Lend blocks for the known tokens of a request with one sample to a transfer that brings their KV.

        Returns the blocks, and how many tokens are in them already (full cached blocks, never the last token's). None,
        and nothing changes, when there are not enough besides what running and interrupted sequences need, or steps on
        their way may still touch them: ask again. The loan ends with ``return_loan``, adopted or not.
        """
        spare = len(self._running) + len(self._lending.adopted)
        first = self._waiting.peek()
        if first is not None and first.preemptions:
            spare += -(-(len(first.tokens) + 1) // self.config.block_size)
        # With no step on its way nothing is unsettled, whatever was planned last.
        settled = self._settled_step if self._settled_step < self._step else self.pool.step
        return self._lending.lend(request, key, spare=spare, settled_step=settled)

    def return_loan(self, key: Hashable) -> None:
        """Take a transfer that came in off its blocks: nobody writes into them any longer; once a loan.

        Those of a sequence that has adopted them stay that one's.
        """
        self._lending.give_back(key)

    def adopt(
        self, request: EngineRequest, key: Hashable, token: int, logprobs: TokenLogprobs | None = None
    ) -> list[Sequence]:
        """Go on with a request whose KV has come, after the token that its sender drew; return its one sequence.

        The token comes out with the next ``StepOutputs``, before any that is drawn here, and so does the sequence's
        ending where that token is its last. Until it gets a slot, before all that wait, it keeps its blocks.
        Raises: InvalidRequest for a name in use; the loan is as it was
        """
        self.check_fits(request, single=True)
        sequence = self._lending.adopt(
            key, request, token, sequence_id=SequenceId(self._next_sequence_id), arrival=self._next_arrival
        )
        self._next_sequence_id += 1
        self._next_arrival += 1
        self._requests[sequence.request_id] = [sequence]
        self._sequences[sequence.sequence_id] = sequence
        self._log(sequence, f"adopted with {len(sequence.tokens)} tokens")
        if logprobs is not None:
            self._adoptions.logprobs[len(self._adoptions.sequences)] = logprobs
        self._adoptions.sequences.append(sequence)
        self._adoptions.token_ids.append(token)
        stopped = token in request.stop_ids
        if stopped or len(sequence.tokens) >= sequence.max_length:
            self._end(self._adoptions, sequence, token if stopped else None)
        return [sequence]

    def take_adoptions(self, outputs: StepOutputs) -> None:
        """Put what adopting brought since the last time before what a step did."""
        if self._adoptions.sequences:
            adoptions, self._adoptions = self._adoptions, StepOutputs()
            outputs.add_before(adoptions)

    # ------------------------------------------------------------------ planning a step

    def schedule(self, now_s: float) -> StepPlan | None:
        """Plan the next step, or return None when nothing can be computed before a result comes in."""
        builder = StepBuilder(self.table)
        # Whatever is given back from here on, this step may still touch.
        self.pool.step = self._step + 1
        order, table = self._running.slots, self.table
        target = table.known[order] + table.pending[order]
        lacking = np.where(target < table.max_length[order], target - table.computed[order], 0)
        self._budget.begin(order, lacking, islice(self._waiting.lengths(), table.free_slots))
        if len(order):
            decodes = order[lacking == 1]
            if self.config.micro_batches > 1:
                decodes = self._share_of_pipeline(decodes)
            self._plan_decodes(builder, decodes)
            self._plan_chunks(builder, order[lacking > 1])
        if not builder.preempted:
            self._admit(builder, now_s)
        plan = builder.finish(self._step + 1, self._running.slots)
        if plan is not None:
            self._step = plan.step
            self._budget.planned(plan)
            self._release_held()
        return plan

    def _share_of_pipeline(self, slots: Int32Array) -> Int32Array:
        """Return what one of several steps in flight may decode: its share of all that do, and none whose token is
        still on its way from the last stage, which the first one would have to wait for.
        """
        ready: Int32Array = slots[self.table.pending[slots] == 0]
        return ready[: -(-len(slots) // self.config.micro_batches)]

    def _plan_decodes(self, builder: StepBuilder, slots: Int32Array) -> None:
        table = self.table
        table.planned[slots] = 1
        crossing = slots[table.computed[slots] >= table.num_blocks[slots] * table.block_size]
        for slot in crossing.tolist():
            # An earlier slot in this loop may have preempted this one.
            if table.planned[slot]:
                self._grow(builder, slot, 1)

    def _plan_chunks(self, builder: StepBuilder, slots: Int32Array) -> None:
        table = self.table
        for slot in slots.tolist():
            start = int(table.computed[slot])
            count = self._budget.chunk(start, int(table.known[slot]) + int(table.pending[slot]) - start)
            # The slot is empty when a better sequence of this loop has preempted it.
            if count > 0 and table.sequences[slot] is not None:
                table.planned[slot] = count
                self._grow(builder, slot, count)

    def _grow(self, builder: StepBuilder, slot: int, count: int) -> None:
        """Give a slot the blocks for ``count`` more tokens, preempting from the end of the order until they are there.

        The slot itself may be the one that is preempted: nobody that the policy serves later is left then.
        """
        table = self.table
        sequence: Sequence = table.sequences[slot]
        end = int(table.computed[slot]) + count
        needed = -(-end // table.block_size) - int(table.num_blocks[slot])
        if needed <= 0:
            return
        while (blocks := self.pool.allocate(needed, Owner(sequence.sequence_id))) is None:
            victim = self._running.last
            self._preempt(builder, victim)
            if victim is sequence:
                return
        sequence.blocks.extend(blocks)
        self._sent.add_blocks(sequence, blocks)
        builder.add_blocks(slot, table.append_blocks(slot, blocks), blocks)

    def _preempt(self, builder: StepBuilder, sequence: Sequence) -> None:
        builder.preempted = True
        self._preemptions += 1
        sequence.preemptions += 1
        sequence.pending = int(self.table.pending[sequence.slot])
        self._sent.stop(sequence)
        sequence.tokens = self._leave_slot(sequence)
        self._enqueue(sequence, "preempted")

    def _leave_slot(self, sequence: Sequence) -> Int32Array:
        """Take a running sequence out of its slot, give its blocks back, and return its known tokens."""
        self._running.remove(sequence)
        tokens = self.table.vacate(sequence.slot)
        sequence.slot = -1
        self.pool.release(sequence.blocks, Owner(sequence.sequence_id))
        sequence.blocks = []
        return tokens

    def _admit(self, builder: StepBuilder, now_s: float) -> None:
        while not self._admission.start_adopted(builder, now_s):
            if self._running:
                return
            # Nobody will give a block back: the one that came last begins again when there is room.
            sequence = self._lending.adopted[-1]
            self._lending.drop(sequence)
            self._preemptions += 1
            sequence.preemptions += 1
            self._enqueue(sequence, "preempted before it ran")
        self._admission.start_waiting(builder, now_s)

    def _release_held(self) -> None:
        """Queue the other samples of requests whose first sample has computed the prompt, or has left."""
        for first_id in list(self._held):
            first = self._sequences.get(first_id)
            running = first is not None and first.state is SequenceState.RUNNING
            if first is None or (running and int(self.table.computed[first.slot]) >= first.prompt_length - 1):
                for sequence in self._held.pop(first_id):
                    if sequence.state is SequenceState.HELD:
                        self._enqueue(sequence, "prompt computed by the first sample")

    # ------------------------------------------------------------------ results

    def update(self, plan: StepPlan, result: StepResult) -> StepOutputs:
        """Take in a step's result: append the drawn tokens, end what has ended, publish full blocks."""
        outputs = StepOutputs()
        table = self.table
        self._settled_step = plan.step
        self._fail_invalid(plan, result, outputs)
        rows = np.flatnonzero(plan.samples)
        current = table.still_there(plan)[rows]
        if not current.all():
            self._update_departed(plan, result, rows[~current], outputs)
            rows = rows[current]
        slots, drawn = plan.slots[rows], result.token_ids[rows]
        table.tokens[slots, table.known[slots]] = drawn
        table.known[slots] += 1
        table.pending[slots] -= 1
        first = len(outputs.sequences)
        outputs.sequences += table.sequences[slots].tolist()
        outputs.token_ids += drawn.tolist()
        for row, logprobs in result.logprobs.items():
            place = int(np.searchsorted(rows, row))
            if place < len(rows) and rows[place] == row:
                outputs.logprobs[first + place] = logprobs
        self._take_prompt_logprobs(plan, result, outputs)
        if self.config.enable_prefix_caching:
            publish_full_blocks(plan, table, self.pool)
        stopped = (table.stop_ids[slots] == drawn[:, None]).any(axis=1)
        ended = stopped | (table.known[slots] >= table.max_length[slots])
        for index in np.flatnonzero(ended).tolist():
            self._end(outputs, outputs.sequences[first + index], int(drawn[index]) if stopped[index] else None)
        return outputs

    def _fail_invalid(self, plan: StepPlan, result: StepResult, outputs: StepOutputs) -> None:
        """End the sequences for which no token could be drawn: a wrong one must not look like an answer."""
        failed = [(row, FinishReason.GRAMMAR) for row in result.grammar_rows]
        failed += [(row, FinishReason.ERROR) for row in result.invalid_rows]
        for row, reason in failed:
            sequence = self._sequences.get(SequenceId(int(plan.sequence_ids[row])))
            if sequence is not None:
                self._finish(sequence, reason)
                outputs.finished.append(sequence)

    def _update_departed(
        self, plan: StepPlan, result: StepResult, rows: NDArray[np.intp], outputs: StepOutputs
    ) -> None:
        """Take in tokens of sequences that were preempted while the step ran; those that have ended are dropped."""
        for row in rows.tolist():
            sequence = self._sequences.get(SequenceId(int(plan.sequence_ids[row])))
            if sequence is None or not sequence.pending:
                continue
            token = int(result.token_ids[row])
            sequence.pending -= 1
            sequence.tokens = np.append(sequence.tokens, np.int32(token))
            if row in result.logprobs:
                outputs.logprobs[len(outputs.sequences)] = result.logprobs[row]
            outputs.sequences.append(sequence)
            outputs.token_ids.append(token)
            stopped = token in sequence.request.stop_ids
            if stopped or len(sequence.tokens) >= sequence.max_length:
                self._end(outputs, sequence, token if stopped else None)

    def _end(self, outputs: StepOutputs, sequence: Sequence, stop_token_id: int | None) -> None:
        sequence.stop_token_id = stop_token_id
        self._finish(sequence, FinishReason.LENGTH if stop_token_id is None else FinishReason.STOP)
        outputs.finished.append(sequence)

    def _take_prompt_logprobs(self, plan: StepPlan, result: StepResult, outputs: StepOutputs) -> None:
        for row, entries in result.prompt_logprobs.items():
            sequence = self._sequences.get(SequenceId(int(plan.sequence_ids[row])))
            if sequence is None or not sequence.prompt_logprobs_due or not entries:
                continue
            outputs.prompt_logprobs.append((sequence, int(plan.starts[row]) + 1, entries))
            if int(plan.starts[row]) + len(entries) >= sequence.prompt_length - 1:
                sequence.prompt_logprobs_due = False

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        was, sequence.state = sequence.state, SequenceState.FINISHED
        match was:
            case SequenceState.RUNNING:
                if reason not in (FinishReason.LENGTH, FinishReason.STOP):
                    self._sent.stop(sequence)
                sequence.tokens = self._leave_slot(sequence)
            case SequenceState.WAITING:
                self._waiting.forget(sequence)
            case SequenceState.ADOPTED:
                self._lending.drop(sequence)
            case _:
                pass
        sequence.finish_reason = reason
        sequence.pending = 0
        del self._sequences[sequence.sequence_id]
        remaining = self._requests[sequence.request_id]
        remaining.remove(sequence)
        if not remaining:
            del self._requests[sequence.request_id]
        self._log(sequence, f"finished: {reason.value}")
        self._release_held()

    # ------------------------------------------------------------------ queues

    def _enqueue(self, sequence: Sequence, event: str) -> None:
        sequence.state = SequenceState.WAITING
        self._waiting.push(sequence)
        self._log(sequence, event)

    def check_integrity(self) -> None:
        """Assert that every sequence is in one place, and that the blocks' owners are the sequences that hold them."""
        held = [sequence for group in self._held.values() for sequence in group]
        places = [*self._waiting.live(), *self._running.live(), *(s for s in held if s.state is SequenceState.HELD)]
        places += self._lending.adopted
        assert len(places) == len(set(map(id, places))) == len(self._sequences), "a sequence is lost, or in two places"
        assert len(self._waiting) == len(self._waiting.live()), "the queue's length is wrong"
        check_owners(self.pool, self.loans, self.table, places)
        self._sent.check()

    def _log(self, sequence: Sequence, event: str) -> None:
        self._story.append((self._step, sequence.request_id, f"sample {sequence.index} {event}"))
