"""Requests that are split between two replicas, whatever carries them: each side read to its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from slipstream.runtime.messages import EngineRequest
from slipstream.runtime.rpc.engine_client import EngineClient, EngineLoadReport, HandOffReport, RequestEvent, SendTo
from slipstream.sdk.errors import SlipstreamError
from slipstream.tests.contracts.engine_client import Answer

PATIENCE_S = 60.0


@dataclass
class Way:
    """One side of a split request."""

    answer: Answer
    report: HandOffReport | None = None
    error: SlipstreamError | None = None

    @property
    def tokens(self) -> list[int]:
        return self.answer.tokens[0]


def follow(stream: AsyncIterator[RequestEvent]) -> asyncio.Task[Way]:
    """Read a request's news to their end, whatever that is."""

    async def read() -> Way:
        way = Way(Answer())
        try:
            async for event in stream:
                way.answer.add(event)
                way.report = event.hand_off or way.report
        except SlipstreamError as error:
            way.error = error
        return way

    return asyncio.create_task(read())


def wait_at(
    client: EngineClient, wanted: EngineRequest, ticket: str, *, timeout_s: float = PATIENCE_S
) -> asyncio.Task[Way]:
    """Let a request wait for its KV."""
    return follow(client.generate(wanted, timeout_s=timeout_s, ticket=ticket))


def send_from(
    client: EngineClient, wanted: EngineRequest, send_to: SendTo, *, timeout_s: float = PATIENCE_S
) -> asyncio.Task[Way]:
    """Have a request's prompt computed and sent on."""
    return follow(client.generate(wanted, timeout_s=timeout_s, send_to=send_to))


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so; the time that may take is the test's."""
    while not condition():
        await asyncio.sleep(0.005)


def load_of(client: EngineClient) -> EngineLoadReport:
    """Return a replica's newest load."""
    load = client.load()
    assert load is not None
    return load


async def all_free(client: EngineClient) -> None:
    """Wait until a replica says that it holds nothing."""

    def free() -> bool:
        load = load_of(client)
        busy = load.running + load.waiting + load.awaiting + load.sending + load.receiving
        return not busy and load.blocks_available == load.blocks_total

    await until(free)
