"""What a replica's prefix cache holds, between the session that brings its changes and the one who wants them.

Until somebody does, what is there is kept, so that they may come late; from then on changes are passed on as they are.
One event loop's own.
"""

from __future__ import annotations

from collections.abc import Callable

from ...sdk.errors import EngineUnavailable
from .engine_client import BlockChanges

MAX_KEPT_BLOCKS = 1 << 20

TellBlocks = Callable[[BlockChanges], None]


class BlocksNews:
    """Changes of one replica's cache. ``max_kept``: blocks that are kept while nobody watches."""

    def __init__(self, *, max_kept: int = MAX_KEPT_BLOCKS) -> None:
        self._max_kept = max_kept
        self._kept: set[bytes] = set()
        self._told: TellBlocks | None = None

    def watch(self, told: TellBlocks) -> None:
        """Tell somebody all that is there, at once, and then every change. Call it once."""
        assert self._told is None, "a replica's blocks are watched already"
        kept, self._kept = self._kept, set()
        self._told = told
        told(BlockChanges(stored=tuple(kept), reset=True))

    def take(self, changes: BlockChanges) -> None:
        """Take in what a session brought.

        Raises: EngineUnavailable when the replica tells of more blocks than any has
        """
        if self._told is not None:
            self._told(changes)
            return
        if changes.reset:
            self._kept.clear()
        self._kept.difference_update(changes.removed)
        self._kept.update(changes.stored)
        if len(self._kept) > self._max_kept:
            raise EngineUnavailable(f"the replica told of {len(self._kept)} cached blocks, more than {self._max_kept}")
