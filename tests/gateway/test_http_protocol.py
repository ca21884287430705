"""Connections below HTTP requests: headers that do not come, or do not end; what comes between requests."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import pytest
import uvicorn
from uvicorn.server import ServerState

from slipstream.runtime.gateway.http_protocol import bounded_protocol
from slipstream.runtime.gateway.settings import RequestLimits
from slipstream.tests.gateway.harness import Setup, asynchronous, serving, until

LIMITS = RequestLimits(headers_timeout_s=0.2, max_headers_bytes=4096)
PACE_S = 0.01
ATTEMPTS = 5
HEAD = b"GET /health HTTP/1.1\r\nhost: x\r\n"
CHUNKED = b"POST /health HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
COMPLETION = (
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 15\r\n\r\n"
    b'{"prompt": "x"}'
)


class Connection:
    """A client below HTTP."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, content: bytes) -> None:
        self.writer.write(content)
        await self.writer.drain()

    async def answer(self) -> tuple[int, bytes]:
        """Read one answer with a content-length; return its status and body."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length"))
        return int(head.split()[1]), await self.reader.readexactly(length)

    async def rest(self) -> bytes:
        """Read until the server has hung up."""
        try:
            return await self.reader.read()
        except ConnectionError:
            return b""

    async def keep_sending(self, pieces: Iterable[bytes]) -> bytes:
        """Send piece after piece, slowly, until the server has hung up; return what it said."""
        said = asyncio.ensure_future(self.rest())
        for piece in pieces:
            done, _ = await asyncio.wait({said}, timeout=PACE_S)
            if done:
                break
            self.writer.write(piece)
        return await said


@asynccontextmanager
async def listening(limits: RequestLimits = LIMITS) -> AsyncIterator[tuple[Setup, ServerState, int]]:
    async with serving(limits=limits) as setup:
        config = uvicorn.Config(setup.app, ws="none", lifespan="off", access_log=False, log_config=None)
        config.load()
        state = ServerState()
        protocol = bounded_protocol(limits)
        server = await asyncio.get_running_loop().create_server(
            lambda: protocol(config=config, server_state=state, app_state={}), "127.0.0.1", 0
        )
        try:
            yield setup, state, server.sockets[0].getsockname()[1]
        finally:
            server.close()


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Connection]:
    connection = Connection(*await asyncio.open_connection("127.0.0.1", port))
    try:
        yield connection
    finally:
        connection.writer.close()


async def told(state: ServerState, port: int, pieces: Callable[[], Iterable[bytes]]) -> bytes:
    """Keep sending until the server has hung up; return what it said.

    A piece that crosses the answer on its way resets the connection, and what was said may be lost: then once more.
    """
    said = b""
    for _ in range(ATTEMPTS):
        async with connected(port) as connection:
            said = await connection.keep_sending(pieces())
        await until(lambda: not state.connections)
        if said:
            break
    return said


def error_code(said: bytes) -> str:
    head, _, body = said.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    return str(json.loads(body)["error"]["code"])


@pytest.mark.parametrize(
    ("beginning", "piece"), [(b"G", b""), (HEAD, b""), (HEAD, b"a: b\r\n"), (HEAD + b"a: ", b"b"), (b"\r\n", b"\r\n")]
)
@asynchronous
async def test_headers_that_do_not_come(beginning: bytes, piece: bytes) -> None:
    async with listening() as (_, state, port):
        said = await told(state, port, lambda: itertools.chain([beginning], itertools.repeat(piece)))
        assert said.startswith(b"HTTP/1.1 408 ") and error_code(said) == "headers_timeout"


@asynchronous
async def test_a_connection_that_says_nothing_is_told_nothing() -> None:
    async with listening() as (_, state, port), connected(port) as connection:
        assert await connection.rest() == b""
        await until(lambda: not state.connections)


@pytest.mark.parametrize("piece", [b"\r\n", b"G", b"x: y\r\n"])
@pytest.mark.parametrize("request_head", [HEAD + b"\r\n", HEAD + b"content-length: 1000000\r\n\r\n", CHUNKED])
@asynchronous
async def test_what_drips_after_an_answer(request_head: bytes, piece: bytes) -> None:
    """Also the body of a request that was answered without it: nobody reads it, so nobody waits for it."""
    async with listening() as (_, state, port), connected(port) as connection:
        await connection.send(request_head)
        assert (await connection.answer())[0] in (200, 405)
        await connection.keep_sending(itertools.repeat(piece))
        await until(lambda: not state.connections)


@pytest.mark.parametrize("beginning", [HEAD, HEAD + b"a: ", b"GET /", CHUNKED + b"0\r\n", CHUNKED + b"1;"])
@pytest.mark.parametrize("piece", [b"a: b\r\n" * 400, b"a" * 1000])
@asynchronous
async def test_headers_that_do_not_end(beginning: bytes, piece: bytes) -> None:
    """Also trailers, and what stands beside a chunk's length."""
    patient = RequestLimits(headers_timeout_s=1000.0, max_headers_bytes=4096)
    async with listening(patient) as (_, state, port):
        said = await told(state, port, lambda: itertools.chain([beginning], itertools.repeat(piece, 1000)))
        assert b"HTTP/1.1 4" in said


@asynchronous
async def test_many_headers_at_once_are_refused_by_name() -> None:
    async with listening() as (_, _, port), connected(port) as connection:
        await connection.send(HEAD + b"a: " + b"b" * 5000)
        said = await connection.rest()
        assert said.startswith(b"HTTP/1.1 431 ") and error_code(said) == "headers_too_large"


@asynchronous
async def test_time_between_requests_and_of_answers_is_not_bounded_by_it() -> None:
    async with listening() as (setup, _, port), connected(port) as connection:
        for _ in range(2):
            await connection.send(HEAD + b"\r\n")
            assert (await connection.answer())[0] == 200
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(connection.reader.read(1), 2 * LIMITS.headers_timeout_s)
        setup.engine.hold.clear()
        await connection.send(COMPLETION)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(connection.reader.read(1), 2 * LIMITS.headers_timeout_s)
        setup.engine.hold.set()
        assert (await connection.answer())[0] == 200


@asynchronous
async def test_a_long_body_in_small_chunks_is_taken() -> None:
    async with listening() as (_, _, port), connected(port) as connection:
        body = json.dumps({"prompt": "x", "user": "y" * 3 * LIMITS.max_headers_bytes}).encode()
        await connection.send(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        for start in range(0, len(body), 4):
            piece = body[start : start + 4]
            await connection.send(b"%x\r\n%s\r\n" % (len(piece), piece))
        await connection.send(b"0\r\n\r\n")
        assert (await connection.answer())[0] == 200
