"""The numbers of every running sequence, as arrays indexed by slot.

A step touches hundreds of sequences; keeping their counters in arrays makes its bookkeeping a few numpy operations
instead of a Python loop. The invariants between the columns, per occupied slot:

    prompt_length <= known            tokens whose values the scheduler has
    pending in {0, 1, ...}            tokens drawn by steps whose results are not back yet
    computed <= known + pending       positions whose KV is computed by the steps planned so far
    known + pending <= max_length
    num_blocks * block_size >= computed
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from ..messages import BoolArray, Int32Array, StepPlan
from .sequence import Sequence

_NO_SEQUENCE = -1
_NO_TOKEN = -1
_NO_TRANSFER = -1


class SlotTable:
    """Fixed-size columns for up to ``max_slots`` running sequences.

    Shapes: tokens [slots, max_length] int32; block_table [slots, max_blocks] int32; stop_ids [slots, widest] int32
    padded with -1; every other column [slots]
    """

    def __init__(self, *, max_slots: int, max_length: int, block_size: int) -> None:
        self.max_slots = max_slots
        self.block_size = block_size
        self.max_blocks = -(-max_length // block_size)
        # np.zeros maps pages on first touch: a long max_length costs nothing until it is used.
        self.tokens = np.zeros((max_slots, max_length), dtype=np.int32)
        self.block_table = np.zeros((max_slots, self.max_blocks), dtype=np.int32)
        self.stop_ids = np.full((max_slots, 1), _NO_TOKEN, dtype=np.int32)
        self.sequence_id = np.full(max_slots, _NO_SEQUENCE, dtype=np.int64)
        self.first_step = np.zeros(max_slots, dtype=np.int64)
        self.known, self.pending, self.computed = (np.zeros(max_slots, dtype=np.int32) for _ in range(3))
        self.prompt_length, self.max_length = (np.zeros(max_slots, dtype=np.int32) for _ in range(2))
        self.num_blocks, self.published = (np.zeros(max_slots, dtype=np.int32) for _ in range(2))
        self.planned = np.zeros(max_slots, dtype=np.int32)
        self.transfer = np.full(max_slots, _NO_TRANSFER, dtype=np.int64)
        self.sending = 0
        """How many slots have a transfer."""
        self.sequences: NDArray[np.object_] = np.full(max_slots, None, dtype=object)
        # The lowest free slot is taken first, so that occupied rows stay dense.
        self._free = list(range(max_slots))

    @property
    def free_slots(self) -> int:
        """How many more sequences can run."""
        return len(self._free)

    def occupy(self, sequence: Sequence, *, computed: int, step: int) -> int:
        """Move a sequence's tokens and counters into a free slot, from a step on, and return the slot."""
        slot = heapq.heappop(self._free)
        known = len(sequence.tokens)
        self.tokens[slot, :known] = sequence.tokens
        self.known[slot], self.pending[slot], self.computed[slot] = known, 0, computed
        self.prompt_length[slot], self.max_length[slot] = sequence.prompt_length, sequence.max_length
        self.num_blocks[slot], self.published[slot], self.planned[slot] = 0, 0, 0
        self.sequence_id[slot], self.first_step[slot] = sequence.sequence_id, step
        self.sequences[slot] = sequence
        self._set_stop_ids(slot, sequence.request.stop_ids)
        return slot

    def send(self, slot: int, transfer: int) -> None:
        """Note that what a slot computes goes to another replica, under this number."""
        self.transfer[slot] = transfer
        self.sending += 1

    def keep(self, slot: int) -> None:
        """Note that what a slot computes goes to nobody, or no longer."""
        if self.transfer[slot] != _NO_TRANSFER:
            self.transfer[slot] = _NO_TRANSFER
            self.sending -= 1

    def sent_slots(self) -> dict[int, int]:
        """Return the transfers by the slots that they are of."""
        slots = np.flatnonzero(self.transfer != _NO_TRANSFER)
        assert len(slots) == self.sending, f"{len(slots)} slots are sent, {self.sending} were counted"
        return dict(zip(slots.tolist(), self.transfer[slots].tolist(), strict=True))

    def vacate(self, slot: int) -> Int32Array:
        """Free a slot and return its known tokens."""
        self.keep(slot)
        tokens: Int32Array = self.tokens[slot, : self.known[slot]].copy()
        self.sequence_id[slot] = _NO_SEQUENCE
        self.sequences[slot] = None
        self.planned[slot] = 0
        heapq.heappush(self._free, slot)
        return tokens

    def still_there(self, plan: StepPlan) -> BoolArray:
        """Return which rows of a plan belong to the sequences that are in their slots now.

        Shapes: returns [rows]
        """
        # A sequence that was preempted may be back in the same slot, with other blocks and less that is computed.
        same: BoolArray = self.sequence_id[plan.slots] == plan.sequence_ids
        return same & (self.first_step[plan.slots] <= plan.step)

    def append_blocks(self, slot: int, blocks: list[int]) -> int:
        """Add blocks at the end of a slot's table; return the index of the first."""
        first = int(self.num_blocks[slot])
        self.block_table[slot, first : first + len(blocks)] = blocks
        self.num_blocks[slot] = first + len(blocks)
        return first

    def check_slot(self, sequence: Sequence) -> None:
        """Assert the invariants between the columns for a running sequence."""
        slot = sequence.slot
        assert self.sequences[slot] is sequence and self.sequence_id[slot] == sequence.sequence_id, f"{sequence}: slot"
        known, pending, computed = int(self.known[slot]), int(self.pending[slot]), int(self.computed[slot])
        assert sequence.prompt_length <= known and pending >= 0, f"{sequence}: {known=} {pending=}"
        assert computed <= known + pending <= self.max_length[slot], f"{sequence}: {computed=} {known=} {pending=}"
        assert self.num_blocks[slot] * self.block_size >= computed, f"{sequence}: too few blocks for {computed=}"
        table = self.block_table[slot, : self.num_blocks[slot]].tolist()
        assert table == sequence.blocks, f"{sequence}: block table {table} is not {sequence.blocks}"

    def _set_stop_ids(self, slot: int, stop_ids: tuple[int, ...]) -> None:
        width = self.stop_ids.shape[1]
        if len(stop_ids) > width:
            wider = np.full((self.max_slots, len(stop_ids)), _NO_TOKEN, dtype=np.int32)
            wider[:, :width] = self.stop_ids
            self.stop_ids = wider
        self.stop_ids[slot] = _NO_TOKEN
        self.stop_ids[slot, : len(stop_ids)] = stop_ids
