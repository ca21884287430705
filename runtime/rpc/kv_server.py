"""The receiving driver's end of talk about KV, over gRPC: a method of the engine's server.

Owns connections, their number and deadlines; what is said is the host's business, which hears it on this event loop and
must not wait. A caller that says what cannot be loses its connection, and nobody else's.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from ...comm.errors import KvMismatch
from ...comm.kv.transfer import FromReceiver
from ...sdk.errors import EngineUnavailable, InvalidRequest, Overloaded, SlipstreamError
from .codec_kv import decode_from_sender, encode_from_receiver
from .door import Door
from .errors import status_of
from .kv_outlet import KvOutlet
from .kv_talk import KvFacts, KvHost
from .wire import KV_SERVICE, TALK

MAX_LINES = 256
_Context = grpc.aio.ServicerContext[bytes, bytes]


class GrpcKvLine:
    """A ``KvLine``."""

    def __init__(self, theirs: KvFacts, outlet: KvOutlet[FromReceiver]) -> None:
        self._theirs = theirs
        self._outlet = outlet

    @property
    def theirs(self) -> KvFacts:
        """What the sending driver said of itself."""
        return self._theirs

    def say(self, message: FromReceiver) -> bool:
        """Send a message, from any thread; False when it is dropped."""
        return self._outlet.say(message)

    def close(self) -> None:
        """End the connection, from any thread."""
        self._outlet.close()


class KvTalkMethods:
    """The service of one host.

    Units: greet_timeout_s, until a caller says what it is; write_timeout_s, how long it may leave a message unread
    """

    def __init__(
        self,
        host: KvHost,
        door: Door,
        *,
        max_lines: int = MAX_LINES,
        greet_timeout_s: float = 5.0,
        write_timeout_s: float = 10.0,
    ) -> None:
        self._host = host
        self._door = door
        self._max_lines = max_lines
        self._greet_timeout_s = greet_timeout_s
        self._write_timeout_s = write_timeout_s
        self._lines = 0

    def handlers(self) -> Any:
        """Return what a server adds."""
        methods: dict[str, Any] = {TALK: grpc.stream_stream_rpc_method_handler(self._talk)}
        return grpc.method_handlers_generic_handler(KV_SERVICE, methods)

    async def _talk(self, requests: Any, context: _Context) -> None:
        del requests
        await self._door.admit(context, TALK)
        ended: SlipstreamError | KvMismatch
        if self._lines >= self._max_lines:
            ended = Overloaded(f"{self._lines} drivers send their KV here already")
            await context.abort(status_of(ended), str(ended))
        self._lines += 1
        try:
            await self._carry(context)
            return
        except (SlipstreamError, KvMismatch) as error:
            ended = error
        finally:
            self._lines -= 1
        await context.abort(status_of(ended), str(ended))

    async def _carry(self, context: _Context) -> None:
        """Carry one caller's talk until it leaves, or raise why it has to."""
        theirs = await self._greeting(context)
        outlet = KvOutlet[FromReceiver](asyncio.get_running_loop(), encode_from_receiver)
        line = GrpcKvLine(theirs, outlet)
        self._host.greet(theirs, line)
        tasks = [
            asyncio.create_task(self._hear(line, context), name="talk about KV, heard"),
            asyncio.create_task(self._say(outlet, context), name="talk about KV, said"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            outlet.close()
            for task in tasks:
                task.cancel()
            self._host.left(line)
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _greeting(self, context: _Context) -> KvFacts:
        try:
            async with asyncio.timeout(self._greet_timeout_s):
                data: object = await context.read()
        except TimeoutError as error:
            raise EngineUnavailable(f"nothing was said within {self._greet_timeout_s:g} s") from error
        theirs = decode_from_sender(data) if isinstance(data, bytes) else None
        if not isinstance(theirs, KvFacts):
            raise InvalidRequest("message", "say what you are before anything else")
        return theirs

    async def _hear(self, line: GrpcKvLine, context: _Context) -> None:
        while isinstance(data := await context.read(), bytes):
            message = decode_from_sender(data)
            if isinstance(message, KvFacts):
                raise InvalidRequest("message", "says a second time what it is")
            self._host.hear(line, message)

    async def _say(self, outlet: KvOutlet[FromReceiver], context: _Context) -> None:
        await self._write(context, encode_from_receiver(self._host.facts))
        while messages := await outlet.get():
            for data in messages:
                await self._write(context, data)
        raise EngineUnavailable("this driver ended the connection")

    async def _write(self, context: _Context, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await context.write(data)
        except TimeoutError as error:
            raise EngineUnavailable(f"a message was left unread for {self._write_timeout_s:g} s") from error
