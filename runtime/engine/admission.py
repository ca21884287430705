"""Starts sequences: gives them slot and blocks, and what of their KV is there already.

Sequences whose KV has come from another replica go first: they hold their blocks whether they run or not. Owns no
sequence: what it starts it takes from the queues that it is given. Called while a step is planned.
"""

from __future__ import annotations

from collections.abc import Callable

from ..config import SchedulerConfig
from .kv_blocks import KvBlockPool, Owner
from .kv_lending import KvLending
from .kv_sending import SentSequences
from .loans import Loans
from .prefix import Reuse, find_cached_prefix, reuse_up_to
from .queues import RunningOrder, WaitingQueue
from .sequence import Sequence, SequenceState
from .slots import SlotTable
from .step_budget import StepBudget
from .step_builder import StepBuilder


class Admission:
    """The way of a scheduler's sequences into slots. ``log`` is told what happens to them."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        pool: KvBlockPool,
        table: SlotTable,
        budget: StepBudget,
        waiting: WaitingQueue,
        running: RunningOrder,
        loans: Loans,
        lending: KvLending,
        sent: SentSequences,
        log: Callable[[Sequence, str], None],
    ) -> None:
        self._config = config
        self._pool = pool
        self._table = table
        self._budget = budget
        self._waiting = waiting
        self._running = running
        self._loans = loans
        self._lending = lending
        self._sent = sent
        self._log = log

    def start_adopted(self, builder: StepBuilder, now_s: float) -> bool:
        """Start sequences whose KV has come; return whether others may take blocks in this step.

        Nobody may before those have the one that they may lack.
        """
        adopted, block_size = self._lending.adopted, self._config.block_size
        while adopted and self._table.free_slots and not self._budget.is_full():
            sequence = adopted[0]
            lacking = -(-len(sequence.tokens) // block_size) - len(sequence.blocks)
            blocks = self._pool.allocate(lacking, Owner(sequence.sequence_id))
            if blocks is None:
                return False
            adopted.popleft()
            self._occupy(builder, sequence, [*sequence.blocks, *blocks], len(sequence.tokens) - 1, now_s)
            self._table.planned[sequence.slot] = 1
        return True

    def start_waiting(self, builder: StepBuilder, now_s: float) -> None:
        """Start those that wait, in their order, until the step or the cache is full."""
        while self._table.free_slots and (sequence := self._waiting.peek()) is not None:
            # A token of a preempted sequence is still on its way; it is needed to recompute.
            if sequence.pending or self._budget.is_full() or not self._start(builder, sequence, now_s):
                return

    def _start(self, builder: StepBuilder, sequence: Sequence, now_s: float) -> bool:
        """Start a waiting sequence if the step has room and its blocks are there; return whether it runs."""
        owner, block_size = Owner(sequence.sequence_id), self._config.block_size
        known = len(sequence.tokens)
        reuse = self._find_reuse(sequence)
        count = self._budget.chunk(reuse.computed, known - reuse.computed)
        if not count:
            return False
        held = [*reuse.shared, reuse.partial] if reuse.partial is not None else list(reuse.shared)
        self._pool.share(held, owner)
        total = -(-(known + 1) // block_size) - len(reuse.shared)
        needed = -(-(reuse.computed + count) // block_size) - len(reuse.shared)
        # Room for all that is known, not for the first chunk only: otherwise prompts would crowd in and push one
        # another out again. A sequence alone always gets in; where there are loans, it waits until they come back.
        alone = not self._running and not self._loans
        fresh = self._pool.allocate(needed, owner) if alone or total <= self._pool.available else None
        if fresh is None:
            self._pool.release(held, owner)
            return False
        if reuse.partial is not None:
            builder.copy(reuse.partial, fresh[0])
            self._pool.release([reuse.partial], owner)
        self._waiting.pop()
        self._occupy(builder, sequence, [*reuse.shared, *fresh], reuse.computed, now_s)
        self._table.planned[sequence.slot] = count
        return True

    def _find_reuse(self, sequence: Sequence) -> Reuse:
        if sequence.prompt_logprobs_due:
            return Reuse()
        first, block_size = sequence.first_sample, self._config.block_size
        limit = sequence.prompt_length - 1
        # The first time, or as long as there is nothing of its own that could be cached.
        fresh = sequence.cached_tokens is None or len(sequence.tokens) == sequence.prompt_length
        if fresh and first is not None and first.slot >= 0 and int(self._table.computed[first.slot]) >= limit:
            return reuse_up_to(limit, first.blocks, block_size)
        if not self._config.enable_prefix_caching:
            return Reuse()
        return find_cached_prefix(sequence, self._pool, block_size)

    def _occupy(self, builder: StepBuilder, sequence: Sequence, blocks: list[int], computed: int, now_s: float) -> None:
        # The step that is being planned: its number is the pool's.
        slot = self._table.occupy(sequence, computed=computed, step=self._pool.step)
        self._table.append_blocks(slot, blocks)
        full = computed // self._config.block_size
        self._table.published[slot] = full
        sequence.slot, sequence.blocks = slot, blocks
        if sequence.cached_tokens is None:
            sequence.cached_tokens = computed
            misses = len(sequence.tokens) // self._config.block_size - full
            self._pool.count_lookups(hits=full, misses=misses)
        sequence.state = SequenceState.RUNNING
        if sequence.first_scheduled_time_s is None:
            sequence.first_scheduled_time_s = now_s
        self._running.add(sequence)
        builder.admit(slot, sequence)
        self._log(sequence, f"admitted with {computed} tokens reused")
        self._sent.begin(sequence)
