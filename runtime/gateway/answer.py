"""How every endpoint that costs something answers: admission, body, work, reply, and an eye on the client all along.

Owns the order of these, what happens when the client goes away, and how an error is told before and after the first
byte. What the work is, it must not know: an endpoint gives a coroutine that returns a ``Whole`` or a ``Streamed``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...sdk.errors import DeadlineExceeded, SlipstreamError
from .admission import Ticket
from .body_writer import BodyWriter, body_writer
from .direct_line import DirectLine
from .errors import ErrorAnswer, answer_for
from .gateway import Gateway
from .idempotency import Claim
from .json_body import json_digest, read_json_object
from .record import RequestRecord, record_of
from .responses import to_event, to_json
from .turns import end_turn, take_turn

logger = logging.getLogger(__name__)

_JSON = (b"content-type", b"application/json")
_EVENTS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
_SENT_AGAIN = (b"idempotent-replayed", b"true")
_DEADLINE_GRACE_S = 2.0
"""The engine notices a deadline by itself and says so; this is for a client that does not read its answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """An answer in one piece."""

    body: object


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """An answer as server-sent events, each ready to be sent; those that go over ``line`` are not among them."""

    events: AsyncGenerator[bytes]
    line: DirectLine


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request being worked on: its body, and what it holds."""

    gateway: Gateway
    record: RequestRecord
    body: dict[str, Any]
    ticket: Ticket

    @property
    def time_left_s(self) -> float:
        """Seconds until the request's deadline, a little at least."""
        elapsed_s = self.gateway.clock() - self.record.arrival_s
        return max(self.gateway.settings.limits.request_timeout_s - elapsed_s, 0.01)


Work = Callable[[Call], Awaitable[Whole | Streamed]]


class Answer(Response):
    """Runs one piece of work for one request.

    A stream's status is sent with its first event: until then an error has a status of its own. Afterwards it becomes
    the last event of the stream, and the stream has no ``[DONE]``.
    """

    def __init__(self, gateway: Gateway, work: Work) -> None:
        super().__init__()
        self._gateway = gateway
        self._work = work
        self._started = False
        self._claim: Claim | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = record_of(scope)
        try:
            await self._admitted(Request(scope, receive), record, send)
        except ClientDisconnect:
            record.outcome = "cancelled"
        except Exception as error:
            if not isinstance(error, SlipstreamError):
                logger.exception("request failed", extra={"request_id": record.request_id})
            answer = answer_for(error)
            record.outcome, record.error = answer.outcome, answer.body["error"]["message"]
            await self._send_error(answer, send)

    async def _admitted(self, request: Request, record: RequestRecord, send: Send) -> None:
        gateway = self._gateway
        limits = gateway.settings.limits
        ticket = await take_turn(gateway, record)
        try:
            body = await read_json_object(request, max_bytes=limits.max_body_bytes, timeout_s=limits.body_timeout_s)
            if (key := request.headers.get("idempotency-key")) is not None:
                self._claim = claim = gateway.kept.claim(
                    record.caller, key, json_digest(request.url.path, body), now_s=gateway.clock()
                )
                if claim.ended_s is not None:
                    await self._send_again(claim, send)
                    return
            await self._watched(Call(gateway=gateway, record=record, body=body, ticket=ticket), request, send)
            if self._claim is not None:
                gateway.kept.keep(self._claim, now_s=gateway.clock())
        finally:
            if self._claim is not None:
                gateway.kept.forget(self._claim)
            end_turn(gateway, record, ticket)

    async def _send_again(self, claim: Claim, send: Send) -> None:
        """Send an answer that was kept."""
        content = bytes(claim.body or b"")
        if claim.streamed:
            await self._start(200, (*_EVENTS, _SENT_AGAIN), send)
            await send({"type": "http.response.body", "body": content, "more_body": False})
        else:
            await self._send_whole(200, content, {"idempotent-replayed": "true"}, send)

    async def _watched(self, call: Call, request: Request, send: Send) -> None:
        """Do the work until it is done, its time is over, or the client has gone away."""
        work = asyncio.ensure_future(self._reply(call, request.scope, send))
        watch = asyncio.ensure_future(_disconnect(request.receive))
        try:
            done, _ = await asyncio.wait(
                (work, watch),
                timeout=call.time_left_s + _DEADLINE_GRACE_S,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if work in done:
                await work
            elif watch in done:
                raise ClientDisconnect
            else:
                raise DeadlineExceeded("the request's time is over")
        finally:
            watch.cancel()
            work.cancel()
            # Until the work has let go of everything the request must not count as ended.
            await asyncio.gather(work, watch, return_exceptions=True)

    async def _reply(self, call: Call, scope: Scope, send: Send) -> None:
        match await self._work(call):
            case Whole(body=body):
                content = to_json(body)
                if self._claim is not None:
                    self._claim.add(content)
                await self._send_whole(200, content, {}, send)
            case Streamed() as streamed:
                call.record.stream = True
                await self._send_events(streamed, body_writer(scope), send)

    async def _send_events(self, streamed: Streamed, writer: BodyWriter | None, send: Send) -> None:
        claim = self._claim
        if claim is not None:
            claim.streamed = True
        async with aclosing(streamed.events) as events:
            async for event in events:
                if not self._started:
                    await self._start(200, _EVENTS, send)
                    # What is to be kept has to pass here.
                    if writer is not None and claim is None:
                        streamed.line.connect(writer)
                if claim is not None:
                    claim.add(event)
                if writer is None:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                else:
                    await writer.drain()
                    writer.write(event)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_error(self, answer: ErrorAnswer, send: Send) -> None:
        if not self._started:
            await self._send_whole(answer.status, to_json(answer.body), answer.headers, send)
            return
        # A client that does not read must not keep this task for ever.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DEADLINE_GRACE_S):
                await send({"type": "http.response.body", "body": to_event(answer.body), "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_whole(self, status: int, content: bytes, headers: dict[str, str], send: Send) -> None:
        own = [(name.encode(), value.encode()) for name, value in headers.items()]
        length = (b"content-length", str(len(content)).encode())
        await self._start(status, (_JSON, length, *own), send)
        await send({"type": "http.response.body", "body": content, "more_body": False})

    async def _start(self, status: int, headers: tuple[tuple[bytes, bytes], ...], send: Send) -> None:
        self._started = True
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})


async def _disconnect(receive: Receive) -> None:
    """Return when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass
