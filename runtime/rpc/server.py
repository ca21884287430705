"""Serves an engine over gRPC: sessions, facts, talk about KV, standard health and reflection.

Owns the connection; requests, order and limits are the host's business. Nothing here runs on the step loop's thread.
Messages are read from bytes by ``codec``, so that a malformed one ends its session by name and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ...sdk.errors import EngineUnavailable, InvalidRequest, SlipstreamError
from .codec import BadSubmit, decode_command
from .codec_events import encode_event, encode_facts
from .door import Door
from .errors import status_of
from .kv_server import MAX_LINES, KvTalkMethods
from .kv_talk import KvHost
from .listening import listen
from .session import Closed, EngineHost, HostSession
from .tls import Tls
from .wire import FACTS, KV_SERVICE, SERVER_OPTIONS, SERVICE, SESSION, is_socket, target_of

_MAX_CONCURRENT_CALLS = 256 + MAX_LINES
_Context = grpc.aio.ServicerContext[bytes, bytes]


class EngineServer:
    """One gRPC server for one engine.

    ``address``: a socket's path, which only this user may then use, or ``host:port``; port 0 takes any free one.
    ``secret``: what callers over TCP have to know. ``kv``: who takes KV from other replicas, if anybody does.
    ``tls``: certificates, for callers over TCP.
    Units: write_timeout_s, how long a gateway may leave one message unread before its session ends
    Raises: ConfigError naming ``address``
    """

    def __init__(
        self,
        host: EngineHost,
        address: str,
        *,
        secret: bytes | None = None,
        write_timeout_s: float = 30.0,
        kv: KvHost | None = None,
        tls: Tls | None = None,
    ) -> None:
        self._host = host
        self._tls = tls
        self._target = target_of(address)
        self._door = Door(None if is_socket(self._target) else secret)
        self._write_timeout_s = write_timeout_s
        self._server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=_MAX_CONCURRENT_CALLS)
        self._health = health.aio.HealthServicer()
        self._server.add_generic_rpc_handlers((self._methods(), *self._door.methods()))
        offered = [SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME]
        if kv is not None:
            self._server.add_generic_rpc_handlers((KvTalkMethods(kv, self._door).handlers(),))
            offered.append(KV_SERVICE)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if self._door.is_open:
            reflection.enable_server_reflection(offered, self._server)

    def _methods(self) -> Any:
        handlers: dict[str, Any] = {
            FACTS: grpc.unary_unary_rpc_method_handler(self._facts),
            SESSION: grpc.stream_stream_rpc_method_handler(self._session),
        }
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    async def start(self) -> str:
        """Listen, and return the address to connect to."""
        shown = await listen(self._server, self._target, tls=self._tls)
        await self.set_serving(True)
        return shown

    async def set_serving(self, serving: bool) -> None:
        """Say over the health service whether new requests are taken."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", SERVICE):
            await self._health.set(service, status)

    async def stop(self, *, grace_s: float) -> None:
        """Take no new calls, give those that run ``grace_s`` seconds to end, then end them."""
        await self._server.stop(grace_s)

    # ------------------------------------------------------------------ methods

    async def _facts(self, request: bytes, context: _Context) -> bytes:
        del request
        await self._door.admit(context, FACTS)
        return encode_facts(self._host.facts)

    async def _session(self, requests: AsyncIterator[bytes], context: _Context) -> None:
        """Carry one gateway's session. However it ends, the gateway's requests end with it."""
        await self._door.admit(context, SESSION)
        try:
            session = self._host.open_session()
        except SlipstreamError as error:
            await context.abort(status_of(error), str(error))
        reader = asyncio.create_task(self._read(requests, session), name="session commands")
        try:
            ended = await self._write(session, context)
        finally:
            session.close()
            reader.cancel()
            await asyncio.wait([reader])
        if ended is not None:
            await context.abort(status_of(ended), str(ended))

    async def _read(self, requests: AsyncIterator[bytes], session: HostSession) -> None:
        try:
            async for data in requests:
                try:
                    session.send(decode_command(data))
                except BadSubmit as error:
                    session.refuse(error.key, error)
                except InvalidRequest as error:
                    session.end(error)
                    return
        finally:
            # The gateway has nothing more to say: it has left.
            session.close()

    async def _write(self, session: HostSession, context: _Context) -> SlipstreamError | None:
        """Write events until there are none; return why the host ended the session, None when the gateway did."""
        while events := await session.receive():
            for event in events:
                try:
                    async with asyncio.timeout(self._write_timeout_s):
                        await context.write(encode_event(event))
                except TimeoutError:
                    return EngineUnavailable(f"the gateway left a message unread for {self._write_timeout_s} s")
                if isinstance(event, Closed):
                    return event.error
        return None
