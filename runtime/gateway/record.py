"""What is known of one HTTP request: for its line in the log and its place in the metrics."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field

from starlette.types import Scope

from .trace import TraceContext, trace_of

_SCOPE_KEY = "slipstream.record"
_SAFE_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One HTTP request, filled in as it goes.

    ``request_id`` is the client's ``x-request-id`` where it sent one that is safe to log; ``trace`` goes on to
    replicas. ``caller`` stands for its API key. ``outcome`` is ``ok``, ``cancelled`` (the client went away) or that of
    the error.
    """

    request_id: str
    arrival_s: float
    caller: str = ""
    trace: TraceContext = field(default_factory=lambda: trace_of(None))
    outcome: str = "ok"
    error: str | None = None
    answer_id: str | None = None
    stream: bool = False
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft_s: float | None = None

    @property
    def trace_id(self) -> str:
        """The request's id in all processes."""
        return self.trace.trace_id


def open_record(scope: Scope, *, now_s: float) -> RequestRecord:
    """Make the record of a request that arrived now, and leave it in its scope."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    parent = next((value for name, value in scope["headers"] if name == b"traceparent"), None)
    record = RequestRecord(request_id=request_id_of(given), arrival_s=now_s, trace=trace_of(parent))
    scope[_SCOPE_KEY] = record
    return record


def request_id_of(given: bytes) -> str:
    """Return the id that a client gave its request, where it is safe to log; else a new one."""
    return given.decode("ascii") if _SAFE_ID.fullmatch(given) else secrets.token_hex(16)


def record_of(scope: Scope) -> RequestRecord:
    """Return the record of the request that a scope belongs to."""
    record: RequestRecord = scope[_SCOPE_KEY]
    return record
