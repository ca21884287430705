"""An engine in another process, over gRPC: one connection, one stream, all requests on it.

Owns the stream and its two tasks. When the stream is lost, everything that waits ends with EngineUnavailable and the
client is done: whoever wants to go on makes a new one, because what the replica holds is a new session's then.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import grpc

from ...sdk.errors import EngineUnavailable, InvalidRequest, Overloaded
from .codec import encode_command
from .codec_events import decode_event, decode_facts
from .door import visit
from .engine_client import EngineFacts
from .errors import SecretRefused
from .session import Command, Submit
from .session_client import DEFAULT_MAX_LIVE_REQUESTS, SessionClient
from .tls import CA_VARIABLE, Tls, open_channel
from .wire import FACTS, SERVICE, SESSION, client_options, is_socket, target_of

_MAX_UNSENT_BYTES = 64 << 20

_Call = grpc.aio.StreamStreamCall[bytes, bytes]


class GrpcEngineClient(SessionClient):
    """The ``EngineClient`` of the driver at ``address``, a socket's path or ``host:port``.

    ``secret``: what both sides have to know where they meet over TCP; ``connect`` raises SecretRefused otherwise.
    ``tls``: certificates for TCP.
    Raises: ConfigError naming ``address``
    """

    def __init__(
        self,
        address: str,
        *,
        secret: bytes | None = None,
        tls: Tls | None = None,
        max_live_requests: int = DEFAULT_MAX_LIVE_REQUESTS,
    ) -> None:
        super().__init__(max_live_requests=max_live_requests)
        self._target = target_of(address)
        self._tls = tls
        self._secret = None if is_socket(self._target) else secret
        self._channel: grpc.aio.Channel | None = None
        self._task: asyncio.Task[None] | None = None
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._something_unsent = asyncio.Event()

    async def _connect(self) -> EngineFacts:
        self._channel = open_channel(self._target, client_options(self._target), self._tls)
        ask: Any = self._channel.unary_unary(f"/{SERVICE}/{FACTS}")
        open_session: Any = self._channel.stream_stream(f"/{SERVICE}/{SESSION}")
        try:
            visiting = await visit(self._channel, self._secret, wait_for_ready=True)
            asked = ask(b"", metadata=visiting.metadata(FACTS), wait_for_ready=True)
            facts = decode_facts(await asked)
            await visiting.check(asked, FACTS)
            call = open_session(metadata=visiting.metadata(SESSION), wait_for_ready=True)
            await visiting.check(call, SESSION)
        except grpc.aio.AioRpcError as error:
            raise _lost(error) from error
        except InvalidRequest as error:
            raise EngineUnavailable(f"the replica cannot be understood: {error}") from error
        self._task = asyncio.create_task(self._run(call), name="engine session")
        return facts

    def _silence_hint(self) -> str:
        # A connection whose certificates are refused is tried again like one to a driver that is not up yet.
        if self._tls is None or is_socket(self._target):
            return ""
        return f"; calls are encrypted here: it needs a certificate that {CA_VARIABLE} has signed, for its host's name"

    def _send(self, command: Command) -> None:
        data = encode_command(command)
        if isinstance(command, Submit) and self._unsent_bytes + len(data) > _MAX_UNSENT_BYTES:
            raise Overloaded(f"{self._unsent_bytes} bytes of requests wait to be sent to the replica already")
        self._unsent.append(data)
        self._unsent_bytes += len(data)
        self._something_unsent.set()

    async def _disconnect(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def _run(self, call: _Call) -> None:
        """Carry events in and commands out until the stream ends, however it ends."""
        failure = EngineUnavailable("the connection to the replica was left")
        writer = asyncio.create_task(self._write(call), name="engine session, commands")
        try:
            async for data in call:
                self._take(decode_event(data))
            failure = EngineUnavailable("the replica ended the session")
        except grpc.aio.AioRpcError as error:
            failure = _lost(error)
        except InvalidRequest as error:
            failure = EngineUnavailable(f"the replica sent what is no news: {error}")
        except EngineUnavailable as error:
            failure = error
        finally:
            self._fail_all(failure)
            call.cancel()
            writer.cancel()
            await asyncio.wait([writer])

    async def _write(self, call: _Call) -> None:
        while True:
            while self._unsent:
                data = self._unsent.popleft()
                self._unsent_bytes -= len(data)
                try:
                    await call.write(data)
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    # The stream is over; the reader is told why.
                    return
            self._something_unsent.clear()
            await self._something_unsent.wait()


def _lost(error: grpc.aio.AioRpcError) -> EngineUnavailable:
    if error.code() is grpc.StatusCode.UNAUTHENTICATED:
        return SecretRefused(f"the replica does not let us in: {error.details()}")
    return EngineUnavailable(f"the replica was lost: {error.code().name}, {error.details()}")
