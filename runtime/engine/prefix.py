"""Finds how much of a sequence is in KV blocks already, and names full blocks by their content.

Owns the chained digests of a sequence (parent's digest, the block's tokens, the sequence's extra keys in the root).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..messages import Int32Array, StepPlan
from .kv_blocks import KvBlockPool, chain_digest
from .sequence import Sequence
from .slots import SlotTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Reuse:
    """KV that a sequence can start from.

    Units: computed, tokens whose KV is there; ``shared`` are full blocks to hold together with their other owners;
    ``partial`` is a block of which only the first ``computed % block_size`` positions are of use: it is copied,
    because the sequence goes on writing where its other owners must not see it.
    """

    computed: int = 0
    shared: tuple[int, ...] = ()
    partial: int | None = None


def reuse_up_to(limit: int, blocks: list[int], block_size: int) -> Reuse:
    """Return the reuse of a run of valid blocks, for at most ``limit`` tokens."""
    computed = min(limit, len(blocks) * block_size)
    full = computed // block_size
    partial = blocks[full] if computed % block_size else None
    return Reuse(computed=computed, shared=tuple(blocks[:full]), partial=partial)


def extend_digests(sequence: Sequence, tokens: Int32Array, block_size: int, count: int) -> None:
    """Make sure that the digests of a sequence's first ``count`` blocks are known; ``tokens`` must cover them."""
    digests = sequence.digests
    while len(digests) < count:
        start = len(digests) * block_size
        parent = digests[-1] if digests else sequence.root
        digests.append(chain_digest(parent, tokens[start : start + block_size].tobytes()))


def find_cached_prefix(sequence: Sequence, pool: KvBlockPool, block_size: int) -> Reuse:
    """Search the prefix cache for a waiting sequence's longest prefix.

    The last known token is always computed anew, because its logits are what the next token is drawn from.
    """
    known = len(sequence.tokens)
    blocks: list[int] = []
    for index in range(known // block_size):
        extend_digests(sequence, sequence.tokens, block_size, index + 1)
        block = pool.lookup(sequence.digests[index])
        if block is None:
            break
        blocks.append(block)
    return reuse_up_to(known - 1, blocks, block_size)


def publish_full_blocks(plan: StepPlan, table: SlotTable, pool: KvBlockPool) -> None:
    """Let the prefix cache have the blocks that a step filled with known tokens."""
    block_size = table.block_size
    current = table.still_there(plan)
    slots = plan.slots[current]
    full = np.minimum(plan.starts[current] + plan.counts[current], table.known[slots]) // block_size
    newly = full > table.published[slots]
    for slot, count in zip(slots[newly].tolist(), full[newly].tolist(), strict=True):
        sequence: Sequence = table.sequences[slot]
        extend_digests(sequence, table.tokens[slot], block_size, count)
        for index in range(int(table.published[slot]), count):
            pool.publish(sequence.blocks[index], sequence.digests[index])
        table.published[slot] = count
