"""Streams over real sockets, where text goes from a token to its client without waking the request's task."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from slipstream.runtime.gateway.body_writer import BodyWriter
from slipstream.runtime.gateway.generation import PromptRun
from slipstream.runtime.gateway.http_protocol import bounded_protocol
from slipstream.runtime.messages import EngineRequest
from slipstream.tests.gateway.harness import Setup, asynchronous, parse_events, serving, until

TEXT = "Grüße aus 你好, a line\nand one more 👩‍👩‍👧 of it"
TOKENS = 200


@asynccontextmanager
async def listening(setup: Setup) -> AsyncIterator[int]:
    """Serve a gateway on a socket, and yield its port."""
    protocol = bounded_protocol(setup.gateway.settings.limits)
    config = uvicorn.Config(setup.app, http=protocol, ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as bound:
        # Not serve: it would take the process's signals.
        serving_task = asyncio.create_task(server._serve([bound]))
        try:
            await until(lambda: server.started)
            yield bound.getsockname()[1]
        finally:
            server.should_exit = True
            await serving_task


async def ask(port: int, path: str, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 12)
    content = json.dumps(body | {"stream": True}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    head += f"content-length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    return reader, writer


async def events_of(reader: asyncio.StreamReader) -> list[dict[str, Any]]:
    """Read a chunked answer to its end, and return its events."""
    head = await reader.readuntil(b"\r\n\r\n")
    assert b" 200 " in head and b"transfer-encoding: chunked" in head, head
    content = bytearray()
    while size := int(await reader.readline(), 16):
        content += await reader.readexactly(size)
        assert await reader.readexactly(2) == b"\r\n"
    events = parse_events(content.decode())
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


async def streamed(port: int, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    reader, writer = await ask(port, path, body)
    try:
        return await events_of(reader)
    finally:
        writer.close()


@asynchronous
async def test_a_completion_is_the_same_over_the_direct_line() -> None:
    async with serving() as setup, listening(setup) as port:
        setup.say(TEXT)
        body = {"prompt": [1, 2], "n": 2, "max_tokens": 300, "stream_options": {"include_usage": True}}
        long_way = await setup.stream("/v1/completions", **body)
        assert setup.engine.taken == 0
        direct = await streamed(port, "/v1/completions", body)
        assert setup.engine.taken > len(TEXT)
        for event in (*long_way, *direct):
            del event["id"]
        assert direct == long_way


@asynchronous
async def test_a_chat_is_the_same_over_the_direct_line() -> None:
    async with serving() as setup, listening(setup) as port:
        setup.say(TEXT)
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 300}
        long_way = await setup.stream("/v1/chat/completions", **body)
        assert setup.engine.taken == 0
        direct = await streamed(port, "/v1/chat/completions", body)
        assert setup.engine.taken > len(TEXT) // 2
        for event in (*long_way, *direct):
            del event["id"]
        assert direct == long_way
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in direct) == TEXT


@asynchronous
async def test_what_is_more_than_text_goes_the_long_way() -> None:
    async with serving() as setup, listening(setup) as port:
        setup.say(TEXT)
        for extra in ({"logprobs": 1}, {"return_token_ids": True}, {"stop": ["one more"]}, {"prompt": [[1], [2]]}):
            body = {"prompt": [1, 2], "max_tokens": 300, **extra}
            long_way = await setup.stream("/v1/completions", **body)
            direct = await streamed(port, "/v1/completions", body)
            texts = [
                "".join(event["choices"][0]["text"] for event in events if event["choices"][0]["index"] == 0)
                for events in (long_way, direct)
            ]
            assert texts[0] == texts[1] != ""
        assert setup.engine.taken == 0


@asynchronous
async def test_a_client_that_does_not_read_closes_the_line_and_loses_nothing() -> None:
    async with serving() as setup, listening(setup) as port:
        letters = setup.say("a" * 900, end=False)
        body = {"prompt": [1], "max_tokens": 1000, "user": "x", "n": 64}
        reader, writer = await ask(port, "/v1/completions", body)
        await until(lambda: setup.engine.taken > 0)
        # It stops where the buffers between are full, and not at the end.
        before = -1
        while setup.engine.taken != before:
            before = setup.engine.taken
            for _ in range(2000):
                await asyncio.sleep(0)
        assert before < 64 * len(letters) // 2
        events = await events_of(reader)
        writer.close()
        text = "".join(event["choices"][0]["text"] for event in events if event["choices"][0]["index"] == 63)
        assert len(text) == 1000


@asynchronous
async def test_a_client_that_leaves_is_noticed() -> None:
    async with serving() as setup, listening(setup) as port:
        setup.say("a" * TOKENS, end=False)
        setup.engine.hold_after = TOKENS // 2
        setup.engine.hold.clear()
        reader, writer = await ask(port, "/v1/completions", {"prompt": [1], "max_tokens": TOKENS})
        await reader.readuntil(b"\r\n\r\n")
        await until(lambda: setup.engine.taken > 0)
        writer.transport.abort()
        await until(lambda: not setup.engine.live)
        assert setup.engine.aborted


@asynchronous
async def test_a_request_leaves_nothing_for_the_garbage_collector() -> None:
    async with serving() as setup, listening(setup) as port:
        body = {"prompt": [1, 2], "max_tokens": 20}
        await streamed(port, "/v1/completions", body)
        gc.collect()
        gc.disable()
        try:
            await streamed(port, "/v1/completions", body)
            await until(lambda: setup.gateway.admission.in_flight == 0)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            # The gateway looks for garbage seldom: what only the collector frees would pile up.
            assert not [thing for thing in gc.garbage if isinstance(thing, BodyWriter | EngineRequest | PromptRun)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
