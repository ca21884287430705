"""The step loop: sessions, bounds, and what it does when nobody asks anything of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from slipstream.runtime.rpc.in_process import InProcessEngineClient
from slipstream.runtime.rpc.outbox import Outbox
from slipstream.runtime.rpc.session import Abort, Closed, Drained, Event, Load, Opened, Rejected, StepNews, Submit
from slipstream.runtime.worker.driver import DriverLimits
from slipstream.runtime.worker.driver_session import DriverSession, News
from slipstream.runtime.worker.inbox import Inbox
from slipstream.sdk.errors import DeadlineExceeded, EngineError, EngineUnavailable, Overloaded
from slipstream.tests.contracts.engine_client import PATIENCE_S, all_is_free
from slipstream.tests.engine.builders import request
from slipstream.tests.fakes.engine_bench import engine_bench
from slipstream.tests.fakes.gated_executor import score
from slipstream.tests.fakes.oracle_executor import expected_tokens
from slipstream.tests.fakes.scripted_host import LOAD


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await test

    asyncio.run(bounded())


def submit(key: int, *, timeout_s: float = PATIENCE_S, **changes: Any) -> Submit:
    return Submit(key=key, request=request(f"r{key}", [key], **changes), timeout_s=timeout_s)


async def events_until(session: DriverSession, kind: type[Event]) -> list[Event]:
    found: list[Event] = []
    while not found or not isinstance(found[-1], kind):
        found += await session.receive()
    return found


def test_one_batch_of_news_a_step() -> None:
    async def test() -> None:
        with engine_bench(gate_open=False, ahead=False) as bench:
            session = bench.loop.open_session()
            for key in range(1, 9):
                session.send(submit(key, max_tokens=20))
            found = await session.receive()
            assert isinstance(found[0], Opened)
            tokens: dict[int, list[int]] = {}
            endings = 0
            while endings < 8:
                bench.gate.allow(1)
                batch = [event for event in await session.receive() if isinstance(event, StepNews)]
                assert len(batch) <= 1
                for news in batch:
                    assert len(set(news.keys)) == len(news.keys), "a step gives a sample one token"
                    endings += len(news.endings)
                    for key, token in zip(news.keys, news.token_ids, strict=True):
                        tokens.setdefault(key, []).append(token)
            assert tokens == {key: expected_tokens([key], 0, 20) for key in range(1, 9)}
            session.close()

    run(test())


def test_a_session_that_does_not_read_is_ended_and_its_requests_are_aborted() -> None:
    async def test() -> None:
        with engine_bench(limits=DriverLimits(max_unread=600)) as bench:
            slow = bench.loop.open_session()
            for key in range(1, 5):
                slow.send(submit(key, max_tokens=250))
            client = InProcessEngineClient(bench.loop)
            await client.connect(timeout_s=PATIENCE_S)
            for key in range(3):
                async for _ in client.generate(request(f"o{key}", [key], max_tokens=200), timeout_s=PATIENCE_S):
                    pass
            (last,) = await slow.receive()
            assert (
                isinstance(last, Closed) and isinstance(last.error, Overloaded) and "does not read" in str(last.error)
            )
            assert await slow.receive() == []
            assert await all_is_free(client)
            await client.close()

    run(test())


def test_too_many_commands_are_refused_and_far_too_many_end_the_session() -> None:
    async def test() -> None:
        with engine_bench(gate_open=False, limits=DriverLimits(max_commands=4)) as bench:
            session = bench.loop.open_session()
            session.send(submit(1, max_tokens=200))
            bench.gate.allow(1)
            await events_until(session, StepNews)
            # The engine is held in a step now: nobody takes commands.
            for key in range(2, 8):
                session.send(submit(key))
            refused = [event for event in await session.receive() if isinstance(event, Rejected)]
            assert [event.key for event in refused] == [6, 7]
            assert all(isinstance(event.error, Overloaded) for event in refused)
            for key in range(2, 8):
                session.send(Abort(key=key))
            closed = (await events_until(session, Closed))[-1]
            assert isinstance(closed, Closed) and isinstance(closed.error, Overloaded)

    run(test())


def test_the_engine_ends_what_is_overdue_by_itself() -> None:
    async def test() -> None:
        with engine_bench(gate_open=False) as bench:
            session = bench.loop.open_session()
            session.send(submit(1, max_tokens=200, timeout_s=1e-6))
            bench.gate.open()
            rejected = (await events_until(session, Rejected))[-1]
            assert isinstance(rejected, Rejected) and isinstance(rejected.error, DeadlineExceeded)
            session.close()

    run(test())


def test_load_is_told_while_nothing_runs() -> None:
    async def test() -> None:
        with engine_bench(limits=DriverLimits(load_period_s=0.01)) as bench:
            session = bench.loop.open_session()
            for _ in range(3):
                await events_until(session, Load)
            session.close()

    run(test())


def test_nothing_runs_while_there_is_nothing_to_do() -> None:
    """Without a session the thread sleeps without a timer; a session wakes it with its first command."""

    async def test() -> None:
        with engine_bench() as bench:
            taken = threading.Event()
            original = bench.loop._post

            def post() -> None:
                taken.set()
                original()

            bench.loop._post = post  # type: ignore[method-assign]
            assert not taken.wait(0.05)
            session = bench.loop.open_session()
            await events_until(session, Load)
            assert taken.is_set()
            session.close()

    run(test())


def test_stopping_ends_every_session_after_its_last_news() -> None:
    async def test() -> None:
        with engine_bench() as bench:
            session = bench.loop.open_session()
            session.send(submit(1, max_tokens=5))
            found: list[Event] = []
            while not any(isinstance(event, StepNews) and event.endings for event in found):
                found += await session.receive()
            bench.loop.close(timeout_s=PATIENCE_S)
            last = await events_until(session, Closed)
            assert isinstance(last[-1], Closed) and isinstance(last[-1].error, EngineUnavailable)
            with pytest.raises(EngineUnavailable):
                bench.loop.open_session()

    run(test())


def test_an_engine_that_is_lost_while_nothing_runs_ends_its_sessions_within_a_load_period() -> None:
    lost = threading.Event()

    def check() -> None:
        if lost.is_set():
            raise EngineError("rank 1 is gone")

    async def test() -> None:
        with engine_bench(check=check, limits=DriverLimits(load_period_s=0.02)) as bench:
            session = bench.loop.open_session()
            session.send(submit(1, max_tokens=5))
            await events_until(session, Load)
            lost.set()
            last = await events_until(session, Closed)
            assert isinstance(last[-1], Closed) and "rank 1 is gone" in str(last[-1].error)

    run(test())


def test_a_receiver_whose_event_loop_is_gone_costs_nothing() -> None:
    loop = asyncio.new_event_loop()
    outbox = Outbox(loop, max_weight=10)
    loop.close()
    for _ in range(100):
        assert outbox.put([Drained()])


def test_long_prompts_log_probabilities_are_told_in_parts() -> None:
    entries = tuple(score(1, place, 63) for place in range(3000))
    loop = asyncio.new_event_loop()
    session = DriverSession(1, Inbox(), Outbox(loop, max_weight=10), max_commands=1)
    loop.close()
    news = News(session=session)
    news.add_scores(1, 1, entries)
    news.add_token(1, 0, 5, None)
    found = news.take(LOAD)
    assert len(found) == 3 and all(isinstance(event, StepNews) and event.weight < 1 << 17 for event in found)
    told = [part for event in found if isinstance(event, StepNews) for _, part in event.prompt_scores]
    assert [entry for part in told for entry in part.entries] == list(entries)
    assert [part.position for part in told] == [1, 1025, 2049]
    assert isinstance(found[-1], StepNews) and found[-1].token_ids == [5], "a prompt's scores come before its tokens"
    assert news.take(LOAD) == []
