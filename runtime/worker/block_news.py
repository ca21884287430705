"""What a driver tells its sessions of the prefix cache: all of it when one begins, then what changed, in batches.

Not after every step: gateways choose a replica by it, and a twentieth of a second is soon enough for that.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..clock import Clock
from ..engine.kv_blocks import KvBlockPool
from ..rpc.engine_client import BlockChanges
from ..rpc.session import BlocksChanged, Event

DIGEST_BYTES = 16
"""Of a digest, what is told: enough that no two blocks look alike."""

BATCH = 1 << 15
_PERIOD_S = 0.05


class BlockNews:
    """Changes of one pool on their way to sessions."""

    def __init__(self, pool: KvBlockPool, *, clock: Clock) -> None:
        self._pool = pool
        self._clock = clock
        self._due_s = float("-inf")

    def all(self) -> list[Event]:
        """Return all that is cached, for a session that begins: call ``changes`` for the others first."""
        return _events(self._pool.cached_digests(), [], reset=True)

    def changes(self, *, now: bool) -> list[Event]:
        """Return what has changed since the last time, if that is long enough ago, or ``now``."""
        now_s = self._clock()
        if not now and now_s < self._due_s:
            return []
        self._due_s = now_s + _PERIOD_S
        changes = self._pool.take_changes()
        return _events(changes.stored, changes.removed, reset=changes.reset)


def _events(stored: Sequence[bytes], removed: Sequence[bytes], *, reset: bool) -> list[Event]:
    """Return changes in batches; what is removed goes first, so that nobody has to know of more than there is."""
    cut_removed = [digest[:DIGEST_BYTES] for digest in removed]
    cut_stored = [digest[:DIGEST_BYTES] for digest in stored]
    parts = [BlockChanges(removed=tuple(cut_removed[at : at + BATCH])) for at in range(0, len(cut_removed), BATCH)]
    parts += [BlockChanges(stored=tuple(cut_stored[at : at + BATCH])) for at in range(0, len(cut_stored), BATCH)]
    if reset:
        parts.insert(0, BlockChanges(reset=True))
    return [BlocksChanged(changes=part) for part in parts]
