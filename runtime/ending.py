"""How a command that holds something in this process ends when it is told to: everything it opened is closed.

Python ends a process at SIGTERM and SIGHUP on the spot, so that a server which it started stays behind. Inside
``ending_on_signals`` they leave as ``SystemExit``, the way Ctrl-C leaves as ``KeyboardInterrupt``. An event loop needs
more: an exception out of a handler bursts whichever callback runs, and its task and the loop with it. There
``run_ending_on_signals`` cancels what runs, as asyncio's runner does for Ctrl-C, and hands the signal on afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, NoReturn, TypeVar

_T = TypeVar("_T")
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP leave the block as ``SystemExit``; in a thread beside the main one, change nothing."""
    with _handling(_exit):
        yield


def run_ending_on_signals(runner: asyncio.Runner, main: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end; SIGTERM or SIGHUP cancels it, and reaches the handler from before once it is over."""
    received: list[int] = []
    task: asyncio.Task[Any] | None = None

    def cancel(number: int, _: FrameType | None) -> None:
        received.append(number)
        if task is not None:
            # From a handler, the loop has to be woken as from another thread.
            runner.get_loop().call_soon_threadsafe(task.cancel)

    async def cancellable() -> _T:
        nonlocal task
        task = asyncio.current_task()
        if received and task is not None:
            task.cancel()
        return await main

    try:
        with _handling(cancel):
            return runner.run(cancellable())
    finally:
        if received:
            signal.raise_signal(received[0])


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _exit(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
