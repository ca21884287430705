"""The invariants that tie sequences, loans and blocks together, asserted."""

from __future__ import annotations

from collections.abc import Iterable

from .kv_blocks import PREFIX_CACHE, KvBlockPool, Owner
from .loans import Loans
from .sequence import Sequence, SequenceState
from .slots import SlotTable

_WITH_BLOCKS = (SequenceState.RUNNING, SequenceState.ADOPTED)


def check_owners(pool: KvBlockPool, loans: Loans, table: SlotTable, sequences: Iterable[Sequence]) -> None:
    """Assert that blocks are owned by the sequences and loans that hold them, and by nobody else."""
    pool.check_integrity()
    holders: dict[int, set[Owner]] = {}
    for owner, blocks in loans.holders().items():
        for block in blocks:
            holders.setdefault(block, set()).add(owner)
    for sequence in sequences:
        running = sequence.state is SequenceState.RUNNING
        assert running == (sequence.slot >= 0), f"{sequence} has the wrong slot"
        assert sequence.state in _WITH_BLOCKS or not sequence.blocks, f"{sequence} holds blocks"
        assert running or sequence.transfer is None, f"{sequence} does not run, and is sent"
        if running:
            table.check_slot(sequence)
        for block in sequence.blocks:
            holders.setdefault(block, set()).add(Owner(sequence.sequence_id))
    for block in range(pool.num_blocks):
        expected = holders.get(block, set())
        assert pool.owners(block) - {PREFIX_CACHE} == expected, f"block {block}: owners are not those that hold it"
