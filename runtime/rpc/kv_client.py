"""The sending driver's end of talk about KV, over gRPC: connects by itself, again and again, until it is closed.

Owns the connections, their deadlines and pauses. Nothing of one connection reaches the next: what was said over one
that broke may never have arrived, and its ear hears of the loss. Safe to use from any thread; ears hear on the loop.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Future
from typing import Any

import grpc

from ...comm.errors import KvMismatch
from ...comm.kv.transfer import FromReceiver, FromSender
from ...sdk.errors import EngineUnavailable, InvalidRequest
from ..clock import Clock, monotonic_clock
from .backoff import Backoff, Jitter, no_jitter
from .codec_kv import decode_from_receiver, encode_from_sender
from .door import visit
from .errors import SecretRefused
from .kv_outlet import KvOutlet
from .kv_talk import KvEar, KvFacts
from .tls import Tls, open_channel
from .wire import KV_SERVICE, TALK, client_options, is_socket, target_of

logger = logging.getLogger(__name__)


class GrpcKvTalker:
    """A ``KvTalker`` whose callers live on ``loop``. ``secret``: what both sides have to know over TCP, ``tls``: their
    certificates there.

    Units: answer_timeout_s, until a driver says what it is; write_timeout_s, how long it may leave a message unread
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        secret: bytes | None = None,
        tls: Tls | None = None,
        clock: Clock = monotonic_clock,
        jitter: Jitter = no_jitter,
        answer_timeout_s: float = 5.0,
        write_timeout_s: float = 10.0,
        first_pause_s: float = 0.1,
        longest_pause_s: float = 2.0,
    ) -> None:
        self._loop = loop
        self._secret = secret
        self._tls = tls
        self._clock = clock
        self._jitter = jitter
        self._answer_timeout_s = answer_timeout_s
        self._write_timeout_s = write_timeout_s
        self._first_pause_s = first_pause_s
        self._longest_pause_s = longest_pause_s

    def call(self, *, replica: str, address: str, ours: KvFacts, ear: KvEar) -> GrpcKvCaller:
        """Connect to the driver of a replica, from any thread; see ``KvTalker.call``."""
        target = target_of(address)
        connection = _Connection(
            replica=replica,
            target=target,
            greeting=encode_from_sender(ours),
            ear=ear,
            secret=None if is_socket(target) else self._secret,
            tls=self._tls,
            answer_timeout_s=self._answer_timeout_s,
            write_timeout_s=self._write_timeout_s,
        )
        backoff = Backoff(
            first_s=self._first_pause_s,
            longest_s=self._longest_pause_s,
            stable_after_s=self._longest_pause_s,
            jitter=self._jitter,
        )
        return GrpcKvCaller(self._loop, connection, ear, backoff, self._clock)


class GrpcKvCaller:
    """A ``KvCaller``."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: _Connection,
        ear: KvEar,
        backoff: Backoff,
        clock: Clock,
    ) -> None:
        self._loop = loop
        self._connection = connection
        self._ear = ear
        self._backoff = backoff
        self._clock = clock
        self._closed = False
        self._outlet = self._new_outlet()
        self._running: Future[None] = asyncio.run_coroutine_threadsafe(self._run(), loop)

    def say(self, message: FromSender) -> bool:
        """Send a message, from any thread; False when it is dropped."""
        return self._outlet.say(message)

    def close(self) -> None:
        """End it, from any thread. Idempotent."""
        self._closed = True
        self._outlet.close()
        self._running.cancel()

    async def wait_closed(self) -> None:
        """Wait until nothing is left of it; call ``close`` first."""
        await asyncio.wait([asyncio.wrap_future(self._running)])

    def _new_outlet(self) -> KvOutlet[FromSender]:
        return KvOutlet[FromSender](self._loop, encode_from_sender)

    async def _run(self) -> None:
        while True:
            began_s = self._clock()
            try:
                await self._connection.talk(self._outlet)
            except (EngineUnavailable, KvMismatch) as error:
                lost: Exception = error
            except Exception as error:
                # Its ear's own fault: it hears of it, and the caller goes on.
                logger.exception("talk about KV failed")
                lost = error
            self._outlet.close()
            self._outlet = self._new_outlet()
            if self._closed:
                # Closed by another thread meanwhile: the outlet that it closed was the last one's.
                self._outlet.close()
                return
            self._ear.lost(lost)
            await asyncio.sleep(self._backoff.pause_s(lasted_s=self._clock() - began_s))


class _Connection:
    """How one connection after another is made to one driver."""

    def __init__(
        self,
        *,
        replica: str,
        target: str,
        greeting: bytes,
        ear: KvEar,
        secret: bytes | None,
        tls: Tls | None,
        answer_timeout_s: float,
        write_timeout_s: float,
    ) -> None:
        self._replica = replica
        self._target = target
        self._greeting = greeting
        self._ear = ear
        self._secret = secret
        self._tls = tls
        self._answer_timeout_s = answer_timeout_s
        self._write_timeout_s = write_timeout_s

    async def talk(self, outlet: KvOutlet[FromSender]) -> None:
        """Connect and carry words both ways until that ends.

        Raises: KvMismatch; SecretRefused; EngineUnavailable; always one of them
        """
        async with open_channel(self._target, client_options(self._target), self._tls) as channel:
            try:
                call = await self._greet(channel)
                await self._carry(call, outlet)
            except TimeoutError as error:
                raise EngineUnavailable(f"{self._name} did not answer within {self._answer_timeout_s:g} s") from error
            except grpc.aio.AioRpcError as error:
                raise self._lost(error.code(), error.details()) from error
            except InvalidRequest as error:
                raise EngineUnavailable(f"{self._name} said what cannot be: {error}") from error

    async def _greet(self, channel: grpc.aio.Channel) -> Any:
        """Say what we are, hear what they are, and meet them."""
        talk: Any = channel.stream_stream(f"/{KV_SERVICE}/{TALK}")
        async with asyncio.timeout(self._answer_timeout_s):
            visiting = await visit(channel, self._secret, wait_for_ready=False)
            call = talk(metadata=visiting.metadata(TALK))
            await visiting.check(call, TALK)
            await self._write(call, self._greeting)
            theirs = await self._read(call)
        if not isinstance(theirs, KvFacts):
            raise InvalidRequest("message", "something before what it is")
        if theirs.replica != self._replica:
            raise EngineUnavailable(f"at {self._target} is replica {theirs.replica!r}, not {self._replica!r}")
        self._ear.met(theirs)
        return call

    async def _carry(self, call: Any, outlet: KvOutlet[FromSender]) -> None:
        tasks = [
            asyncio.create_task(self._hear(call), name="talk about KV, heard"),
            asyncio.create_task(self._say(call, outlet), name="talk about KV, said"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            call.cancel()

    async def _hear(self, call: Any) -> None:
        while True:
            message = await self._read(call)
            if isinstance(message, KvFacts):
                raise InvalidRequest("message", "a second time what it is")
            self._ear.hear(message)

    async def _say(self, call: Any, outlet: KvOutlet[FromSender]) -> None:
        while messages := await outlet.get():
            for data in messages:
                try:
                    async with asyncio.timeout(self._write_timeout_s):
                        await self._write(call, data)
                except TimeoutError as error:
                    unread = f"{self._name} left a message unread for {self._write_timeout_s:g} s"
                    raise EngineUnavailable(unread) from error
        raise EngineUnavailable("the caller was closed")

    async def _read(self, call: Any) -> FromReceiver | KvFacts:
        data = await call.read()
        if data is grpc.aio.EOF:
            raise EngineUnavailable(f"{self._name} ended the connection")
        return decode_from_receiver(data)

    async def _write(self, call: Any, data: bytes) -> None:
        try:
            await call.write(data)
        except asyncio.InvalidStateError as error:
            # It ended before: why is in its status.
            raise self._lost(await call.code(), await call.details()) from error

    @property
    def _name(self) -> str:
        return f"replica {self._replica!r} at {self._target}"

    def _lost(self, code: grpc.StatusCode, details: str | None) -> EngineUnavailable | KvMismatch:
        if code is grpc.StatusCode.FAILED_PRECONDITION:
            return KvMismatch(f"{self._name} does not take our KV: {details}")
        if code is grpc.StatusCode.UNAUTHENTICATED:
            return SecretRefused(f"{self._name} does not let us in: {details}")
        return EngineUnavailable(f"{self._name} was lost: {code.name}, {details}")
