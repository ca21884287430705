"""Where views come from, whatever carries them: the contract, and its implementation within one process.

``ViewBoard`` holds the newest view for those who publish; ``ViewSource`` is what those who follow see. A contract suite
in ``tests`` runs on every implementation. One event loop's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Protocol

from ..reconcile.views import View


class ViewSource(Protocol):
    """A way to follow views."""

    @property
    def problem(self) -> str:
        """Why nothing is heard at the moment, "" while something is: the last view holds meanwhile."""
        ...

    def views(self) -> AsyncGenerator[View]:
        """Yield the newest view and each newer one, without end.

        Epochs only grow, whoever answers; views between may be left out. What stands in the way is in ``problem``, and
        tried again.
        """
        ...


class ViewBoard:
    """The newest view, and who waits for one that is newer. Nothing is kept of those before."""

    def __init__(self) -> None:
        self._newest = View()
        self._changed = asyncio.Event()

    @property
    def newest(self) -> View:
        """The view with the highest epoch so far; of epoch 0 before the first."""
        return self._newest

    def publish(self, view: View) -> bool:
        """Show a view; return False, and leave it, when its epoch is not above the newest."""
        if view.epoch <= self._newest.epoch:
            return False
        self._newest = view
        # Whoever waits has hold of the old one.
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        return True

    async def newer(self, epoch: int) -> View:
        """Wait for a view above an epoch, and return the newest."""
        while self._newest.epoch <= epoch:
            await self._changed.wait()
        return self._newest


class InProcessViewWatch:
    """The ``ViewSource`` of a board in this process."""

    problem = ""

    def __init__(self, board: ViewBoard) -> None:
        self._board = board

    async def views(self) -> AsyncGenerator[View]:
        """Yield the newest view and each newer one."""
        epoch = 0
        while True:
            view = await self._board.newer(epoch)
            epoch = view.epoch
            yield view
