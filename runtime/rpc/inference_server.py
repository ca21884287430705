"""The public inference service over gRPC, for programs of users. What is asked is the gateway's business.

Owns calls, their number, deadlines and ends. Everybody may connect; who may ask, the gateway says by the API key that a
call brings. Health and reflection are open.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ...sdk.errors import EngineUnavailable, InvalidRequest
from .codec_inference import code_of, decode_generate, encode_models, reply_of
from .inference import Caller, InferenceHost, InferenceRefused
from .inference_session import InferenceSession
from .listening import listen
from .tls import Tls
from .wire import GENERATE, INFERENCE_SERVICE, INFERENCE_SESSION, LIST_MODELS, SERVER_OPTIONS, target_of

FIELD_KEY = "slipstream-field"
RETRY_KEY = "retry-after"
MAX_SESSIONS = 64
_OTHER_CALLS = 64
_MAX_FIELD_CHARS = 128
_MAX_MESSAGE_CHARS = 2000
_Context = grpc.aio.ServicerContext[bytes, bytes]


class InferenceServer:
    """One gRPC server for one gateway.

    ``address``: ``host:port``, or a socket's path. ``max_requests``: calls of one request at once.
    Units: write_timeout_s, how long a caller may leave a message unread
    Raises: ConfigError naming ``address``
    """

    def __init__(
        self,
        host: InferenceHost,
        address: str,
        *,
        max_requests: int,
        tls: Tls | None = None,
        max_sessions: int = MAX_SESSIONS,
        write_timeout_s: float = 30.0,
    ) -> None:
        self._host = host
        self._target = target_of(address)
        self._tls = tls
        self._max_sessions = max_sessions
        self._sessions = 0
        self._write_timeout_s = write_timeout_s
        most = max_requests + max_sessions + _OTHER_CALLS
        self._server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=most)
        handlers: dict[str, Any] = {
            GENERATE: grpc.unary_stream_rpc_method_handler(self._generate),
            INFERENCE_SESSION: grpc.stream_stream_rpc_method_handler(self._session),
            LIST_MODELS: grpc.unary_unary_rpc_method_handler(self._list_models),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(INFERENCE_SERVICE, handlers),))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        offered = (INFERENCE_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(offered, self._server)

    async def start(self) -> str:
        """Listen, and return the address to connect to. Raises: ConfigError naming ``address``"""
        shown = await listen(self._server, self._target, tls=self._tls)
        await self.set_serving(True)
        return shown

    async def set_serving(self, serving: bool) -> None:
        """Say over the health service whether new requests are taken."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", INFERENCE_SERVICE):
            await self._health.set(service, status)

    async def stop(self, *, grace_s: float) -> None:
        """Take no new calls, give those that run ``grace_s`` seconds to end, then end them."""
        await self._server.stop(grace_s)

    # ------------------------------------------------------------------ methods

    async def _list_models(self, request: bytes, context: _Context) -> bytes:
        del request
        try:
            self._host.check(_caller(context))
        except InferenceRefused as error:
            await _refuse(context, error)
        return encode_models(self._host.models())

    async def _generate(self, request: bytes, context: _Context) -> None:
        try:
            ask = decode_generate(request)
            async with aclosing(self._host.generate(ask, _caller(context), None)) as answer:
                async for news in answer:
                    await self._write(context, reply_of(news).SerializeToString())
            return
        except InferenceRefused as error:
            refused = error
        except InvalidRequest as error:
            refused = InferenceRefused(400, str(error), param=error.field)
        except EngineUnavailable as error:
            refused = InferenceRefused(503, str(error))
        await _refuse(context, refused)

    async def _session(self, requests: AsyncIterator[bytes], context: _Context) -> None:
        """Carry one caller's session. However it ends, its requests end with it."""
        caller = _caller(context)
        try:
            self._host.check(caller)
            if self._sessions >= self._max_sessions:
                raise InferenceRefused(429, f"{self._sessions} sessions are open already", retry_after_s=1.0)
        except InferenceRefused as error:
            await _refuse(context, error)
        session = InferenceSession(self._host, caller, write=context.write, write_timeout_s=self._write_timeout_s)
        self._sessions += 1
        tasks = [asyncio.create_task(self._read(requests, session)), asyncio.create_task(session.write_all())]
        try:
            await asyncio.gather(*tasks)
            return
        except InvalidRequest as error:
            refused = InferenceRefused(400, str(error), param=error.field)
        except EngineUnavailable as error:
            refused = InferenceRefused(503, str(error))
        finally:
            self._sessions -= 1
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await session.close()
        await _refuse(context, refused)

    async def _read(self, requests: AsyncIterator[bytes], session: InferenceSession) -> None:
        async for data in requests:
            await session.take(data)
        # The caller has asked all that it wants; what runs may end.
        session.finish()

    async def _write(self, context: _Context, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await context.write(data)
        except TimeoutError as error:
            raise EngineUnavailable(f"a message was left unread for {self._write_timeout_s:g} s") from error


def _caller(context: _Context) -> Caller:
    given: dict[str, bytes] = {}
    for key, value in context.invocation_metadata() or ():
        given.setdefault(key, value.encode() if isinstance(value, str) else value)
    return Caller(
        authorization=given.get("authorization"),
        traceparent=given.get("traceparent"),
        timeout_s=_time_left(context),
    )


def _time_left(context: _Context) -> float | None:
    """Return the seconds until a call's deadline; None without one."""
    left_s: Any = context.time_remaining()
    return None if left_s is None or not math.isfinite(left_s) else max(left_s, 0.0)


async def _refuse(context: _Context, error: InferenceRefused) -> NoReturn:
    trailing: list[tuple[str, str]] = []
    if error.param:
        # Metadata are ASCII; a field may quote what a caller sent.
        field = error.param[:_MAX_FIELD_CHARS].encode("ascii", "backslashreplace").decode()
        trailing.append((FIELD_KEY, field))
    if error.retry_after_s:
        trailing.append((RETRY_KEY, str(math.ceil(error.retry_after_s))))
    code = grpc.StatusCode[code_of(error)]
    await context.abort(code, str(error)[:_MAX_MESSAGE_CHARS], tuple(trailing))
    raise AssertionError("an aborted call goes on")
