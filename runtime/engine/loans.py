"""Blocks that transfers own, beside sequences and the prefix cache.

A loan is known by a key of whoever holds it; in the pool it is an owner like any other, numbered downwards below the
prefix cache, and no number is used twice. So a block of a sequence that ended stays out of use while a transport reads
it, and one that another replica writes into is nobody else's.
"""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as SequenceOf

from .kv_blocks import PREFIX_CACHE, KvBlockPool, Owner


class Loans:
    """Who holds which blocks of a pool on loan. A key is used for one loan at a time."""

    def __init__(self, pool: KvBlockPool) -> None:
        self._pool = pool
        self._held: dict[Hashable, tuple[Owner, list[int]]] = {}
        self._next_owner = PREFIX_CACHE - 1

    def __len__(self) -> int:
        """Return how many loans there are."""
        return len(self._held)

    def __contains__(self, key: Hashable) -> bool:
        """Return whether there is a loan of this key."""
        return key in self._held

    def hold(self, key: Hashable, blocks: SequenceOf[int]) -> None:
        """Let a loan own blocks that somebody holds already, besides those that it has; the first time, begin it."""
        owner, held = self._entry(key)
        self._pool.share(blocks, owner)
        held += blocks

    def take(self, key: Hashable, count: int, *, settled_step: int) -> list[int] | None:
        """Give a loan so many blocks that nobody else holds; None, and it gets none, when there are not enough.

        ``settled_step`` as in ``KvBlockPool.allocate_settled``: somebody else than a step is going to write them.
        """
        owner, held = self._entry(key)
        blocks = self._pool.allocate_settled(count, owner, settled_step=settled_step)
        held += blocks or ()
        return blocks

    def blocks(self, key: Hashable) -> list[int]:
        """Return a loan's blocks, in the order in which it got them."""
        return list(self._held[key][1])

    def release(self, key: Hashable) -> None:
        """End a loan: take it off its blocks."""
        owner, held = self._held.pop(key)
        self._pool.release(held, owner)

    def holders(self) -> dict[Owner, list[int]]:
        """Return every loan's blocks by its number as an owner."""
        return dict(self._held.values())

    def _entry(self, key: Hashable) -> tuple[Owner, list[int]]:
        entry = self._held.get(key)
        if entry is None:
            entry = self._held[key] = (Owner(self._next_owner), [])
            self._next_owner -= 1
        return entry
