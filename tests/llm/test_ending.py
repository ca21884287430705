"""Signals that end a command: what runs in its event loop is closed, and the exit status tells which it was."""

from __future__ import annotations

import asyncio
import logging
import signal

import pytest

from slipstream.runtime.ending import ending_on_signals, run_ending_on_signals

DEADLINE_S = 30.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_inside_a_subtask_closes_all_of_them(number: int, caplog: pytest.LogCaptureFixture) -> None:
    closed: list[int] = []

    async def one(index: int) -> None:
        try:
            if index == 1:
                # The handler runs in the middle of this task's step.
                signal.raise_signal(number)
            await asyncio.wait_for(asyncio.Event().wait(), DEADLINE_S)
        finally:
            closed.append(index)

    async def several() -> None:
        async with asyncio.TaskGroup() as tasks:
            for index in range(3):
                tasks.create_task(one(index))

    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(SystemExit) as ended,
        ending_on_signals(),
        asyncio.Runner() as runner,
    ):
        run_ending_on_signals(runner, several())
    assert ended.value.code == 128 + number
    assert sorted(closed) == [0, 1, 2]
    # "Task exception was never retrieved" is how a burst loop shows.
    assert not caplog.records


def test_without_a_signal_it_returns_what_the_coroutine_returns_and_the_handlers_are_back() -> None:
    async def answer() -> int:
        return 42

    before = signal.getsignal(signal.SIGTERM)
    with ending_on_signals(), asyncio.Runner() as runner:
        assert run_ending_on_signals(runner, answer()) == 42
        assert run_ending_on_signals(runner, answer()) == 42
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_between_two_runs_ends_at_once() -> None:
    with pytest.raises(SystemExit), ending_on_signals():
        signal.raise_signal(signal.SIGTERM)
