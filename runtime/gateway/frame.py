"""The frame around every HTTP request: its id, its key, its line in the log, its place in the metrics.

Plain ASGI, because it sees every piece of every stream. What escapes from within ends here as a 500 that says nothing
of our insides.
"""

from __future__ import annotations

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ErrorAnswer, HttpRefusal, answer_for
from .gateway import Gateway
from .operations_api import PATHS as _OPERATIONS
from .record import RequestRecord, open_record
from .responses import to_json

logger = logging.getLogger(__name__)

_NO_KEY_NEEDED = _OPERATIONS | {"/openapi.json"}


class RequestFrame:
    """Wraps an application."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = open_record(scope, now_s=self._gateway.clock())
        status = 0

        async def framed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", record.request_id.encode()),
                    (b"traceparent", record.trace.traceparent.encode()),
                ]
            await send(message)

        try:
            record.caller = self._caller(scope)
            await self._app(scope, receive, framed_send)
        except asyncio.CancelledError:
            record.outcome = "cancelled"
            raise
        except Exception as error:
            if not isinstance(error, HttpRefusal):
                logger.exception("request failed", extra={"request_id": record.request_id})
            answer = answer_for(error)
            record.outcome, record.error = answer.outcome, answer.body["error"]["message"]
            if status:
                raise
            await send_error(answer, framed_send)
        finally:
            self._note(scope, record, status)

    def _caller(self, scope: Scope) -> str:
        """Check a request's key, and return what stands for it."""
        if scope["path"] in _NO_KEY_NEEDED:
            return ""
        given = next((value for name, value in scope["headers"] if name == b"authorization"), None)
        return self._gateway.keys.check(given)

    def _note(self, scope: Scope, record: RequestRecord, status: int) -> None:
        elapsed_s = self._gateway.clock() - record.arrival_s
        route = scope.get("route")
        # Only paths that are routes: a client must not be able to make labels.
        endpoint = getattr(route, "path", "other")
        if record.outcome == "ok" and status >= 400:
            record.outcome = "unavailable" if status == 503 else "refused"
        self._gateway.metrics.request_ended(endpoint, record.outcome, elapsed_s)
        level = logging.DEBUG if endpoint in _OPERATIONS else logging.INFO
        fields = {
            "request_id": record.request_id,
            "trace_id": record.trace_id,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "outcome": record.outcome,
            "elapsed_s": round(elapsed_s, 6),
            "ttft_s": None if record.ttft_s is None else round(record.ttft_s, 6),
            "answer_id": record.answer_id,
            "stream": record.stream,
            "prompt_tokens": record.prompt_tokens,
            "output_tokens": record.output_tokens,
            "error": record.error,
        }
        logger.log(level, "request", extra={"fields": fields})


async def send_error(answer: ErrorAnswer, send: Send) -> None:
    """Send an error as a whole answer."""
    content = to_json(answer.body)
    headers = {"content-type": "application/json", "content-length": str(len(content)), **answer.headers}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": encoded})
    await send({"type": "http.response.body", "body": content, "more_body": False})
