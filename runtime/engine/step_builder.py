"""Collects what one step adds, and freezes it into a ``StepPlan``."""

from __future__ import annotations

import numpy as np

from ..messages import AdmittedSequence, Int32Array, StepPlan
from .sequence import Sequence
from .slots import SlotTable

_NO_ROWS = np.empty(0, dtype=np.int32)
_NO_TRANSFERS = np.empty(0, dtype=np.int64)


class StepBuilder:
    """The step that is being planned: admissions, new blocks and copies; the counts stand in the slot table."""

    def __init__(self, table: SlotTable) -> None:
        self._table = table
        self._admitted: list[tuple[int, Sequence]] = []
        self._block_slots: list[int] = []
        self._block_indices: list[int] = []
        self._block_ids: list[int] = []
        self._copies: list[tuple[int, int]] = []
        self.preempted = False

    def admit(self, slot: int, sequence: Sequence) -> None:
        """Record that a sequence enters the executor with the blocks that its slot has now."""
        self._admitted.append((slot, sequence))

    def add_blocks(self, slot: int, first_index: int, blocks: list[int]) -> None:
        """Record blocks appended to a slot that the executor knows already."""
        self._block_slots.extend([slot] * len(blocks))
        self._block_indices.extend(range(first_index, first_index + len(blocks)))
        self._block_ids.extend(blocks)

    def copy(self, source: int, target: int) -> None:
        """Record that a block must be copied before the step computes."""
        self._copies.append((source, target))

    def finish(self, step: int, order: Int32Array) -> StepPlan | None:
        """Freeze the step; ``order`` lists the running slots. None when there is nothing to compute.

        Advances ``computed`` and ``pending``: from here on the step counts as done, because executors work in order.
        """
        table = self._table
        slots = order[table.planned[order] > 0]
        if not len(slots):
            return None
        counts = table.planned[slots]
        starts = table.computed[slots]
        ends = starts + counts
        samples = ends == table.known[slots] + table.pending[slots]
        block_slots = np.array(self._block_slots, dtype=np.int32)
        # A sequence that was preempted after it had got blocks in this very step no longer owns them.
        kept = table.planned[block_slots] > 0
        table.computed[slots] = ends
        table.pending[slots] += samples
        sending_rows, transfers = _NO_ROWS, _NO_TRANSFERS
        if table.sending:
            sending_rows = np.flatnonzero(table.transfer[slots] >= 0).astype(np.int32)
            transfers = table.transfer[slots[sending_rows]]
        plan = StepPlan(
            step=step,
            admitted=tuple(self._admit_message(slot, sequence) for slot, sequence in self._admitted),
            slots=slots,
            sequence_ids=table.sequence_id[slots],
            starts=starts,
            counts=counts,
            samples=samples,
            copy_sources=np.array([source for source, _ in self._copies], dtype=np.int32),
            copy_targets=np.array([target for _, target in self._copies], dtype=np.int32),
            block_slots=block_slots[kept],
            block_indices=np.array(self._block_indices, dtype=np.int32)[kept],
            block_ids=np.array(self._block_ids, dtype=np.int32)[kept],
            sending_rows=sending_rows,
            sending_transfers=transfers,
        )
        table.planned[slots] = 0
        return plan

    def _admit_message(self, slot: int, sequence: Sequence) -> AdmittedSequence:
        table = self._table
        return AdmittedSequence(
            slot=slot,
            sequence_id=sequence.sequence_id,
            token_ids=sequence.tokens,
            prompt_length=sequence.prompt_length,
            block_ids=table.block_table[slot, : table.num_blocks[slot]].copy(),
            params=sequence.request.params,
            seed=sequence.seed,
            stop_ids=sequence.request.stop_ids,
            wants_prompt_logprobs=sequence.prompt_logprobs_due,
        )
