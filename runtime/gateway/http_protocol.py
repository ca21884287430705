"""The HTTP protocol of one connection, with bounds on what comes before and between requests.

uvicorn waits without end for a request's headers, however many of them there are, and for what else a client sends that
makes no request. Here a connection has ``headers_timeout_s`` from its first moment, and again from the first byte after
an answer, until the headers of a request are complete; and nothing that it sends may go on for more than
``max_headers_bytes`` without completing headers, a piece of a body, or a message. Bodies are bounded by ``json_body``.
"""

from __future__ import annotations

import asyncio
from asyncio.events import TimerHandle
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .body_writer import leave_body_writer
from .errors import HttpRefusal, answer_for
from .responses import to_json
from .settings import RequestLimits

_REASONS = {408: "Request Timeout", 431: "Request Header Fields Too Large"}


class BoundedProtocol(HttpToolsProtocol):
    """One connection; ``limits`` is set by ``bounded_protocol``."""

    limits: ClassVar[RequestLimits]

    _headers_timer: TimerHandle | None = None
    _bytes_for_nothing = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        """Take bytes in, as long as they lead to something."""
        if self._between_requests():
            self._wait_for_headers()
        self._bytes_for_nothing += len(data)
        super().data_received(data)
        if self._bytes_for_nothing > self.limits.max_headers_bytes:
            self._refuse(431, f"more than {self.limits.max_headers_bytes} bytes of headers", "headers_too_large")

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        super().connection_lost(exc)

    def on_headers_complete(self) -> None:
        """Hand the request on. Its task has been made, and runs after this."""
        self._stop_waiting()
        self._bytes_for_nothing = 0
        super().on_headers_complete()
        # Of a request that is upgraded there is no cycle; the one there is an earlier request's.
        if getattr(self.cycle, "scope", None) is self.scope:
            leave_body_writer(self.scope, self.cycle)

    def on_body(self, body: bytes) -> None:
        """Hand a piece of the body on."""
        self._bytes_for_nothing = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that the request is there."""
        self._bytes_for_nothing = 0
        super().on_message_complete()

    def _between_requests(self) -> bool:
        # None before the first request, though uvicorn's annotation does not say so.
        return self.cycle is None or self.cycle.response_complete  # type: ignore[redundant-expr]

    def _wait_for_headers(self) -> None:
        if self._headers_timer is None:
            self._headers_timer = self.loop.call_later(self.limits.headers_timeout_s, self._headers_are_late)

    def _stop_waiting(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _headers_are_late(self) -> None:
        self._headers_timer = None
        self._refuse(408, f"no request came within {self.limits.headers_timeout_s:g} s", "headers_timeout")

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Say why and hang up; to who has said nothing, and in the midst of an answer, there is nothing to say."""
        if self.transport.is_closing():
            return
        if self._bytes_for_nothing and self._between_requests():
            content = to_json(answer_for(HttpRefusal(status, message, code=code)).body)
            head = (
                f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + content)
        self.transport.close()


def bounded_protocol(limits: RequestLimits) -> type[BoundedProtocol]:
    """Return the protocol for a server with these limits: uvicorn makes one for each connection."""
    return type("BoundedProtocol", (BoundedProtocol,), {"limits": limits})
