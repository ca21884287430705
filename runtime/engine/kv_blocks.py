"""Owns the KV blocks of a replica: who holds which block, and which blocks hold a known prefix.

Knows integers and digests only, never tensors. A block has a *set* of owners (sequences, transfers, the prefix
cache) and is free exactly when the set is empty, so that no two parties can free it under each other. Blocks that
only the prefix cache owns are handed out again, least recently used first, when no free block is left.

On a request's way: the scheduler asks here for blocks before it plans a step, and gives them back when a sequence
ends or is preempted.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, NewType

Owner = NewType("Owner", int)
"""Who holds a block: a sequence id (positive), the prefix cache, or a loan (below it)."""

PREFIX_CACHE = Owner(-1)


def chain_digest(parent: bytes, token_bytes: bytes) -> bytes:
    """Return the digest of a block given its predecessor's digest and its own tokens.

    SHA-256, because a collision would serve one prompt the KV of another: the tokens are chosen by strangers, so the
    hash has to resist being attacked, not only accidents.
    """
    return hashlib.sha256(parent + token_bytes).digest()


def root_digest(*extra_keys: str | None) -> bytes:
    """Return the digest that stands before a sequence's first block.

    Everything besides the tokens that the KV depends on (cache salt of a tenant, rope length, adapter) goes in here,
    each key length-prefixed so that different lists never look alike.
    """
    digest = hashlib.sha256()
    for key in extra_keys:
        encoded = b"-" if key is None else key.encode()
        digest.update(f"{-1 if key is None else len(encoded)}:".encode() + encoded)
    return digest.digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixCacheStats:
    """Counters since the start: block look-ups that hit and missed, and cached blocks given up for space."""

    hits: int
    misses: int
    evictions: int


class CacheChanges(NamedTuple):
    """Digests that the prefix cache has got and given up. ``reset``: forget all that was known before."""

    stored: list[bytes]
    removed: list[bytes]
    reset: bool


class KvBlockPool:
    """A fixed number of KV blocks with owner sets and a content-addressed prefix cache.

    Raises: ValueError when fewer than one block is asked for.
    """

    def __init__(self, num_blocks: int, *, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks
        self.enable_prefix_caching = enable_prefix_caching
        self._owners: list[set[Owner]] = [set() for _ in range(num_blocks)]
        self._free: deque[int] = deque(range(num_blocks))
        self._digest_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        # Blocks that the prefix cache alone owns, least recently used first.
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._hits = self._misses = self._evictions = 0
        self.step = 0
        """The newest step that can have to do with a block which is given back now; the scheduler counts it up."""
        self._left_at = [0] * num_blocks
        # Whether a digest was stored or removed last, since somebody asked; None while nobody does, or for too long.
        self._changes: dict[bytes, bool] | None = None

    @property
    def available(self) -> int:
        """Blocks that can be handed out now: free ones and those that only the prefix cache owns."""
        return len(self._free) + len(self._evictable)

    @property
    def cached(self) -> int:
        """Blocks that the prefix cache owns, alone or with others."""
        return len(self._digest_of)

    @property
    def stats(self) -> PrefixCacheStats:
        """Return the prefix cache's counters."""
        return PrefixCacheStats(hits=self._hits, misses=self._misses, evictions=self._evictions)

    def owners(self, block: int) -> frozenset[Owner]:
        """Return who holds a block now."""
        return frozenset(self._owners[block])

    def allocate(self, count: int, owner: Owner) -> list[int] | None:
        """Hand out ``count`` blocks to an owner, or None (and change nothing) when there are not enough."""
        if count > self.available:
            return None
        blocks = []
        for _ in range(count):
            block = self._free.popleft() if self._free else self._evict_oldest()
            self._owners[block].add(owner)
            blocks.append(block)
        return blocks

    def allocate_settled(self, count: int, owner: Owner, *, settled_step: int) -> list[int] | None:
        """As ``allocate``, for an owner whose blocks are written by somebody else than a step: only blocks that were
        given back before ``settled_step``, the newest step that is over, or in it.

        Steps run in order, so a step may have a block that one before it still reads or writes; a transfer may not.
        """
        free = self._first_settled(self._free, count, settled_step)
        cached = self._first_settled(self._evictable, count - free, settled_step)
        if free + cached < count:
            return None
        blocks = [self._free.popleft() for _ in range(free)] + [self._evict_oldest() for _ in range(cached)]
        for block in blocks:
            self._owners[block].add(owner)
        return blocks

    def _first_settled(self, blocks: Iterable[int], at_most: int, settled_step: int) -> int:
        # In the order in which they were given back, nearly: those that stand behind a younger one wait with it.
        settled = 0
        for block in islice(blocks, at_most):
            if self._left_at[block] > settled_step:
                break
            settled += 1
        return settled

    def share(self, blocks: SequenceOf[int], owner: Owner) -> None:
        """Add an owner to blocks that are held already (by a sequence, a transfer or the prefix cache)."""
        for block in blocks:
            owners = self._owners[block]
            assert owners, f"block {block} is free and cannot be shared"
            assert owner not in owners, f"owner {owner} holds block {block} already"
            owners.add(owner)
            self._evictable.pop(block, None)

    def release(self, blocks: SequenceOf[int], owner: Owner) -> None:
        """Take an owner off its blocks.

        The last block is released first, so that of a cached prefix the tail is given up before the head: a head
        without a tail is still of use, a tail without a head never.
        """
        for block in reversed(blocks):
            owners = self._owners[block]
            assert owner in owners, f"owner {owner} does not hold block {block}"
            owners.remove(owner)
            self._left_at[block] = self.step
            if not owners:
                self._free.append(block)
            elif len(owners) == 1 and PREFIX_CACHE in owners:
                self._evictable[block] = None

    def publish(self, block: int, digest: bytes) -> None:
        """Let the prefix cache own a full block whose content is known by its chained digest.

        When another block holds the same content already, that one stays the cache's and this one stays private.
        """
        if not self.enable_prefix_caching or digest in self._block_of or block in self._digest_of:
            return
        assert self._owners[block], f"block {block} is free and cannot be published"
        self._owners[block].add(PREFIX_CACHE)
        self._digest_of[block] = digest
        self._block_of[digest] = block
        self._note_change(digest, stored=True)

    def lookup(self, digest: bytes) -> int | None:
        """Return the block that holds this content, or None."""
        return self._block_of.get(digest)

    def count_lookups(self, *, hits: int, misses: int) -> None:
        """Record the outcome of a prefix search, once per admission, for the metrics."""
        self._hits += hits
        self._misses += misses

    def reset_prefix_cache(self) -> int:
        """Forget every cached prefix that no one uses; return how many blocks became free."""
        freed = 0
        while self._evictable:
            self._free.append(self._evict_oldest())
            freed += 1
        return freed

    def _evict_oldest(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        digest = self._digest_of.pop(block)
        del self._block_of[digest]
        self._owners[block].discard(PREFIX_CACHE)
        self._evictions += 1
        self._note_change(digest, stored=False)
        return block

    def cached_digests(self) -> list[bytes]:
        """Return the digests of all blocks that the prefix cache owns."""
        return list(self._block_of)

    def take_changes(self) -> CacheChanges:
        """Return what the prefix cache has got and given up since the last time; all of it the first time, and when
        more has changed since than it is worth to remember.
        """
        changes, self._changes = self._changes, {}
        if changes is None:
            return CacheChanges(stored=self.cached_digests(), removed=[], reset=True)
        stored = [digest for digest, is_stored in changes.items() if is_stored]
        return CacheChanges(stored, [digest for digest, is_stored in changes.items() if not is_stored], reset=False)

    def _note_change(self, digest: bytes, *, stored: bool) -> None:
        if self._changes is None:
            return
        self._changes[digest] = stored
        # More digests than blocks: all that is cached is the shorter answer.
        if len(self._changes) > 2 * self.num_blocks:
            self._changes = None

    def check_integrity(self) -> None:
        """Assert the invariants that tie owner sets, free list and prefix cache together."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block stands twice in the free list"
        for block, owners in enumerate(self._owners):
            assert (block in free) == (not owners), f"block {block}: free={block in free}, owners={owners}"
            assert (PREFIX_CACHE in owners) == (block in self._digest_of), f"block {block}: cache entry mismatch"
            assert (owners == {PREFIX_CACHE}) == (block in self._evictable), f"block {block}: evictable mismatch"
        assert len(self._block_of) == len(self._digest_of), "two digests name one block"
        for digest, block in self._block_of.items():
            assert self._digest_of[block] == digest, f"block {block}: digest mismatch"
