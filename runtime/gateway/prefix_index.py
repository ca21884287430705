"""Which replica has which blocks cached, as their block events say: how much of a prompt each has already.

A core. One look-up serves all replicas: a block's digest leads to the set of replicas that have it, as the bits of a
number. A cache gives tails up before heads, so a replica's hit ends at the first block that it lacks.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..rpc.engine_client import BlockChanges


class PrefixIndex:
    """Cached blocks of replicas with one block size.

    ``max_blocks``: entries of all replicas together; what comes beyond is not taken in, and counted as ``dropped``.
    """

    def __init__(self, *, max_blocks: int = 4 << 20) -> None:
        self._max_blocks = max_blocks
        self._holders: dict[bytes, int] = {}
        self._own: dict[str, set[bytes]] = {}
        self._bits: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._entries = 0
        self.dropped = 0

    def __len__(self) -> int:
        """Return how many blocks are known, each counted for every replica that has it."""
        return self._entries

    def blocks_of(self, name: str) -> int:
        """Return how many blocks of a replica are known."""
        return len(self._own.get(name, ()))

    def join(self, name: str) -> None:
        """Begin with a replica whose cache is not known yet."""
        self.leave(name)
        place = next(place for place in range(len(self._names) + 1) if 1 << place not in self._names)
        self._bits[name] = 1 << place
        self._names[1 << place] = name
        self._own[name] = set()

    def leave(self, name: str) -> None:
        """Forget a replica. Idempotent."""
        if name in self._bits:
            self._forget(name, self._own[name])
            del self._names[self._bits.pop(name)], self._own[name]

    def note(self, name: str, changes: BlockChanges) -> None:
        """Take in what a replica's cache has got and given up; of one that has not joined, nothing."""
        own, bit = self._own.get(name), self._bits.get(name, 0)
        if own is None:
            return
        if changes.reset:
            self._forget(name, own)
            own.clear()
        self._forget(name, own.intersection(changes.removed))
        own.difference_update(changes.removed)
        holders = self._holders
        for digest in changes.stored:
            if digest in own:
                continue
            if self._entries >= self._max_blocks:
                self.dropped += 1
                continue
            own.add(digest)
            holders[digest] = holders.get(digest, 0) | bit
            self._entries += 1

    def hits(self, strides: Iterable[tuple[bytes, ...]]) -> dict[str, int]:
        """Return how many blocks of a prompt each replica has from its beginning, without those that have none.

        ``strides``: the digests of its blocks in order, in pieces of any length; no more is asked for than of use.
        """
        found: dict[str, int] = {}
        holders = self._holders.get
        have = -1
        before = 0
        for stride in strides:
            still = have & holders(stride[-1], 0)
            if still != have or before == 0:
                have = self._hits_within(stride, have, before, found)
                if not have:
                    break
            before += len(stride)
        if have > 0:
            for name in self._named(have):
                found[name] = before
        return found

    def _hits_within(self, stride: tuple[bytes, ...], have: int, before: int, found: dict[str, int]) -> int:
        """Note whose hits end within a stride; return whose go on."""
        holders = self._holders.get
        for place, digest in enumerate(stride):
            still = have & holders(digest, 0)
            if still != have:
                if before + place:
                    for name in self._named(have & ~still):
                        found[name] = before + place
                have = still
                if not have:
                    break
        return have

    def _named(self, bits: int) -> list[str]:
        names = []
        while bits:
            low = bits & -bits
            names.append(self._names[low])
            bits ^= low
        return names

    def _forget(self, name: str, digests: Iterable[bytes]) -> None:
        holders, bit = self._holders, self._bits[name]
        for digest in digests:
            left = holders[digest] ^ bit
            if left:
                holders[digest] = left
            else:
                del holders[digest]
            self._entries -= 1

    def check_integrity(self) -> None:
        """Assert that both sides of the index say the same."""
        assert self._entries == sum(map(len, self._own.values())), "entries are counted wrongly"
        for digest, bits in self._holders.items():
            assert bits, "a block is held by nobody"
            for name in self._named(bits):
                assert digest in self._own[name], f"{name} does not know that it holds a block"
        assert self._entries == sum(bits.bit_count() for bits in self._holders.values()), "a block is not indexed"
