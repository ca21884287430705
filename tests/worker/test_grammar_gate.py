"""Requests that wait for their constraint: beside the steps of others, bounded, and gone when nobody wants them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from slipstream.runtime.rpc.session import Abort, Drain, Drained, Event, Rejected, StepNews, Submit
from slipstream.runtime.worker import grammar_gate
from slipstream.runtime.worker.driver_session import DriverSession
from slipstream.sdk.errors import DeadlineExceeded, InvalidRequest, Overloaded
from slipstream.sdk.structured import StructuredOutputsParams
from slipstream.tests.contracts.engine_client import PATIENCE_S
from slipstream.tests.engine.builders import request
from slipstream.tests.fakes.engine_bench import EngineBench, engine_bench


class HeldCompiler:
    """Compiles when it is let."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun = threading.Semaphore(0)
        self.compiled: set[StructuredOutputsParams] = set()

    def has(self, constraint: StructuredOutputsParams) -> bool:
        return constraint in self.compiled

    def compile(self, constraint: StructuredOutputsParams) -> None:
        self.begun.release()
        assert self.go.wait(PATIENCE_S)
        if constraint.regex == "bad":
            raise InvalidRequest("structured_outputs.regex", "is bad")
        if constraint.regex == "broken":
            raise RuntimeError("a bug")
        self.compiled.add(constraint)


def submit(key: int, regex: str | None = None, *, timeout_s: float = PATIENCE_S, **changes: Any) -> Submit:
    constraint = None if regex is None else StructuredOutputsParams(regex=regex)
    return Submit(
        key=key, request=request(f"r{key}", [key], structured_outputs=constraint, **changes), timeout_s=timeout_s
    )


async def until(session: DriverSession, kind: type[Event]) -> Any:
    while True:
        for event in await session.receive():
            if isinstance(event, kind) and (not isinstance(event, StepNews) or event.endings):
                return event


@contextmanager
def held() -> Iterator[tuple[EngineBench, HeldCompiler]]:
    compiler = HeldCompiler()
    with engine_bench(compiler=compiler) as bench:
        try:
            yield bench, compiler
        finally:
            compiler.go.set()


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await test

    asyncio.run(bounded())


def test_others_go_on_while_a_constraint_is_compiled() -> None:
    async def test() -> None:
        with held() as (bench, compiler):
            session = bench.loop.open_session()
            session.send(submit(1, "a"))
            await asyncio.to_thread(compiler.begun.acquire)
            session.send(submit(2))
            assert [ending.key for ending in (await until(session, StepNews)).endings] == [2]
            compiler.go.set()
            assert [ending.key for ending in (await until(session, StepNews)).endings] == [1]
            session.send(submit(3, "a"))
            assert [ending.key for ending in (await until(session, StepNews)).endings] == [3], "compiled already"
            session.close()

    run(test())


def test_what_cannot_be_compiled_is_refused() -> None:
    async def test() -> None:
        with held() as (bench, compiler):
            compiler.go.set()
            session = bench.loop.open_session()
            for key, regex in enumerate(("bad", "broken"), 1):
                session.send(submit(key, regex))
                rejected = await until(session, Rejected)
                assert rejected.key == key and isinstance(rejected.error, InvalidRequest), rejected
            session.close()

    run(test())


def test_an_engine_without_a_vocabulary_refuses() -> None:
    async def test() -> None:
        with engine_bench() as bench:
            session = bench.loop.open_session()
            session.send(submit(1, "a"))
            rejected = await until(session, Rejected)
            assert isinstance(rejected.error, InvalidRequest) and rejected.error.field == "structured_outputs"
            session.close()

    run(test())


def test_nothing_starts_that_was_aborted_or_is_overdue_meanwhile() -> None:
    async def test() -> None:
        with held() as (bench, compiler):
            session = bench.loop.open_session()
            session.send(submit(1, "a"))
            session.send(submit(2, "b", timeout_s=0.02))
            rejected = await until(session, Rejected)
            assert rejected.key == 2 and isinstance(rejected.error, DeadlineExceeded)
            session.send(Abort(key=1))
            session.send(submit(3))
            await until(session, StepNews)
            compiler.go.set()
            session.send(submit(4))
            assert [ending.key for ending in (await until(session, StepNews)).endings] == [4]
            assert bench.scheduler.load.running == bench.scheduler.load.waiting == 0
            session.close()

    run(test())


def test_a_drain_waits_for_what_is_being_compiled() -> None:
    async def test() -> None:
        with held() as (bench, compiler):
            session = bench.loop.open_session()
            session.send(submit(1, "a"))
            await asyncio.to_thread(compiler.begun.acquire)
            session.send(Drain())
            session.send(submit(2))
            rejected = await until(session, Rejected)
            assert rejected.key == 2, "refused, and not drained yet"
            compiler.go.set()
            seen: list[Event] = []
            while not any(isinstance(event, Drained) for event in seen):
                seen += await session.receive()
            assert any(isinstance(event, StepNews) and event.endings for event in seen)
            session.close()

    run(test())


def test_a_session_that_leaves_takes_its_waiting_requests_along() -> None:
    async def test() -> None:
        with held() as (bench, compiler):
            session, other = bench.loop.open_session(), bench.loop.open_session()
            session.send(submit(1, "a"))
            await asyncio.to_thread(compiler.begun.acquire)
            session.close()
            compiler.go.set()
            other.send(submit(1))
            await until(other, StepNews)
            other.close()

    run(test())


def test_too_many_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_gate, "_MAX_WAITING", 3)

    async def test() -> None:
        with held() as (bench, _):
            session = bench.loop.open_session()
            for key in range(1, 5):
                session.send(submit(key, "a" * key))
            rejected = await until(session, Rejected)
            assert rejected.key == 4 and isinstance(rejected.error, Overloaded)
            session.close()

    run(test())
