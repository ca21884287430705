"""Blocks for KV that another replica computes, until the sequence that it is of adopts them.

Owns what is lent for this and to which request, and the sequences that were made of it and wait for a slot; their
blocks are theirs then. Every call is the scheduler's; what adopting means for a request is decided there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np

from ..config import SchedulerConfig
from ..messages import EngineRequest, SequenceId
from .kv_blocks import KvBlockPool, Owner
from .loans import Loans
from .prefix import extend_digests, find_cached_prefix
from .sequence import Sequence, SequenceState, make_sequences

Root = Callable[[EngineRequest], bytes]
"""Returns the digest that stands before a request's first block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lent:
    """What adopting begins from: the request's sequence without a number, and how much of it was here already."""

    sequence: Sequence
    cached_tokens: int


class KvLending:
    """What is lent to transfers that come in. ``adopted``: sequences that have their blocks and wait for a slot."""

    def __init__(self, config: SchedulerConfig, pool: KvBlockPool, loans: Loans, root: Root) -> None:
        self.adopted: deque[Sequence] = deque()
        self._block_size = config.block_size
        self._pool = pool
        self._loans = loans
        self._root = root
        self._lent: dict[Hashable, _Lent] = {}
        # The one that was refused last is asked for again and again; what its blocks hold is worked out once.
        self._refused: Sequence | None = None

    def fits(self, request: EngineRequest) -> bool:
        """Return whether a request's KV fits when nothing else is here, its next token included."""
        known = known_tokens(request)
        return known < len(request.prompt_token_ids) + request.max_tokens and (
            self._blocks_for(known + 1) <= self._pool.num_blocks
        )

    def lend(
        self, request: EngineRequest, key: Hashable, *, spare: int, settled_step: int
    ) -> tuple[list[int], int] | None:
        """Lend blocks for all known tokens of a request; return them, and how many tokens are in them already.

        ``spare``: how many blocks are left for others; ``settled_step``: the newest step that is over. None, and
        nothing changes, when there are not enough.
        """
        if self._pool.available <= spare:
            return None
        sequence = self._sequence_of(request)
        # Of a prompt that is cached whole the last block comes anyway: it is entered again by the next token, or is
        # what that stands behind.
        shared = list(find_cached_prefix(sequence, self._pool, self._block_size).shared)
        count = self._blocks_for(len(sequence.tokens)) - len(shared)
        self._loans.hold(key, shared)
        # What is shared is out of the way now, so that it is not counted as available.
        if count + spare > self._pool.available or self._loans.take(key, count, settled_step=settled_step) is None:
            self._loans.release(key)
            self._refused = sequence
            return None
        first_token = len(shared) * self._block_size
        self._lent[key] = _Lent(sequence=sequence, cached_tokens=first_token)
        return self._loans.blocks(key), first_token

    def adopt(
        self, key: Hashable, request: EngineRequest, token: int, *, sequence_id: SequenceId, arrival: int
    ) -> Sequence:
        """Return the sequence of a loan that is filled, with the token that its sender drew; it owns the blocks too.

        ``request`` is what the loan was for; its name may be another. Its full blocks are the prefix cache's from now
        on.
        """
        lent = self._lent.pop(key)
        sequence, blocks = lent.sequence, self._loans.blocks(key)
        computed = len(sequence.tokens)
        sequence.sequence_id, sequence.arrival, sequence.request = sequence_id, arrival, request
        sequence.state, sequence.blocks = SequenceState.ADOPTED, blocks
        sequence.cached_tokens = lent.cached_tokens
        self._pool.share(blocks, Owner(sequence_id))
        full, cached = computed // self._block_size, lent.cached_tokens // self._block_size
        self._pool.count_lookups(hits=cached, misses=full - cached)
        if self._pool.enable_prefix_caching:
            extend_digests(sequence, sequence.tokens, self._block_size, full)
            for block, digest in zip(blocks, sequence.digests[:full], strict=False):
                self._pool.publish(block, digest)
        sequence.tokens = np.append(sequence.tokens, np.int32(token))
        self.adopted.append(sequence)
        return sequence

    def give_back(self, key: Hashable) -> None:
        """End a loan; what was adopted stays with its sequence."""
        self._lent.pop(key, None)
        self._loans.release(key)

    def drop(self, sequence: Sequence) -> None:
        """Take an adopted sequence that waits for a slot off its blocks; it is nowhere then."""
        self.adopted.remove(sequence)
        self._pool.release(sequence.blocks, Owner(sequence.sequence_id))
        sequence.blocks = []

    def _sequence_of(self, request: EngineRequest) -> Sequence:
        refused, self._refused = self._refused, None
        if refused is not None and refused.request is request:
            return refused
        [sequence] = make_sequences(request, first_id=0, arrival=0, root=self._root(request))
        return sequence

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_size)


def known_tokens(request: EngineRequest) -> int:
    """Return how many tokens the only sample of a request has: its prompt, and what was drawn elsewhere."""
    drawn = request.generated[0] if request.generated else None
    return len(request.prompt_token_ids) + (0 if drawn is None else len(drawn))
