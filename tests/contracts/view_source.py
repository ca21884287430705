"""The contract of ``ViewSource``, as tests: an implementation's test module subclasses this and says how to serve."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

from slipstream.runtime.reconcile.views import View
from slipstream.runtime.rpc.view_source import ViewBoard, ViewSource
from slipstream.tests.fakes.views import view

PATIENCE_S = 20.0

MakeSource = Callable[[], ViewSource]


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run a test, and not for ever."""

    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await test

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    """Let others run until a condition holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0)


async def give_up(waiting: asyncio.Future[View]) -> None:
    """Wait no longer for a view; only then may its source be closed."""
    waiting.cancel()
    await asyncio.wait((waiting,))


async def views_until(views: AsyncGenerator[View], epoch: int) -> list[View]:
    """Return what comes up to an epoch, which must come."""
    found = []
    async for each in views:
        found.append(each)
        if each.epoch >= epoch:
            break
    return found


class ViewSourceContract(ABC):
    """What every way to follow views has to keep."""

    @abstractmethod
    def serve(self, board: ViewBoard) -> AbstractAsyncContextManager[MakeSource]:
        """Publish what is on a board; yield what makes sources of it."""

    def test_the_newest_comes_first_and_then_each_newer(self) -> None:
        async def test() -> None:
            board = ViewBoard()
            for epoch in (1, 4):
                board.publish(view(epoch, {"p-1": f"host:{epoch}"}))
            async with self.serve(board) as make, aclosing(make().views()) as views:
                assert await anext(views) == view(4, {"p-1": "host:4"})
                for epoch in (5, 6, 9):
                    board.publish(view(epoch, {"p-2": f"host:{epoch}"}))
                    assert await anext(views) == view(epoch, {"p-2": f"host:{epoch}"})

        run(test())

    def test_before_the_first_view_there_is_nothing(self) -> None:
        async def test() -> None:
            board = ViewBoard()
            async with self.serve(board) as make, aclosing(make().views()) as views:
                first = asyncio.ensure_future(anext(views))
                await asyncio.wait((first,), timeout=0.1)
                assert not first.done()
                board.publish(view(1))
                assert (await first).epoch == 1

        run(test())

    def test_views_may_be_left_out_and_the_last_one_comes(self) -> None:
        async def test() -> None:
            board = ViewBoard()
            async with self.serve(board) as make, aclosing(make().views()) as views:
                board.publish(view(1))
                await anext(views)
                for epoch in range(2, 200):
                    board.publish(view(epoch))
                epochs = [each.epoch for each in await views_until(views, 199)]
                assert epochs == sorted(set(epochs)) and epochs[-1] == 199
                # Nobody had time to take them one by one.
                assert len(epochs) < 100

        run(test())

    def test_an_epoch_that_is_not_above_the_newest_is_no_news(self) -> None:
        async def test() -> None:
            board = ViewBoard()
            assert board.publish(view(5))
            async with self.serve(board) as make, aclosing(make().views()) as views:
                await anext(views)
                assert not board.publish(view(5, {"p-1": "other:1"}))
                assert not board.publish(view(3))
                board.publish(view(6))
                assert (await anext(views)).epoch == 6

        run(test())

    def test_many_watch_and_come_and_go(self) -> None:
        async def test() -> None:
            board = ViewBoard()
            board.publish(view(1))
            async with self.serve(board) as make:
                sources = [make() for _ in range(8)]
                watching = [source.views() for source in sources]
                assert [(await anext(views)).epoch for views in watching] == [1] * 8
                for views in watching[:4]:
                    await views.aclose()
                board.publish(view(2))
                assert [(await anext(views)).epoch for views in watching[4:]] == [2] * 4
                assert all(source.problem == "" for source in sources[4:])
                for views in watching[4:]:
                    await views.aclose()

        run(test())
