"""From our errors to HTTP: the one table, and OpenAI's JSON shape.

Owns status codes and error types. It must not know routes or requests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import TypedDict

from ...sdk.errors import (
    Blame,
    CheckpointError,
    ConfigError,
    DeadlineExceeded,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
    Overloaded,
    SlipstreamError,
)

MAX_MESSAGE_CHARS = 2_000
"""A message quotes what a client sent; it must not send megabytes back."""

_FIELD_NAMES = {"prompt_token_ids": "prompt", "sampling_params": None}
"""Names inside → names that a client knows."""


class HttpRefusal(SlipstreamError):
    """A request that the gateway itself refuses, with the status it is refused with."""

    blame: ClassVar[Blame] = Blame.CALLER

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, closes: bool = False
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.closes = closes


class BusyRefusal(Overloaded):
    """The gateway's own bound was reached; ``retry_after_s`` says when there may be room."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Draining(EngineUnavailable):
    """The gateway is about to stop and takes no new requests."""


class ErrorBody(TypedDict):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(TypedDict):
    """OpenAI's error answer."""

    error: ErrorBody


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorAnswer:
    """One error as HTTP: status, body, headers; ``outcome`` is its label in metrics and logs."""

    status: int
    outcome: str
    body: ErrorEnvelope
    headers: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    status: int
    type: str
    code: str | None
    outcome: str
    retry_after_s: float | None = None


# The first class that matches counts: subclasses before their bases.
_TABLE: tuple[tuple[type[SlipstreamError], _Row], ...] = (
    (InvalidRequest, _Row(status=400, type="invalid_request_error", code="invalid_value", outcome="invalid")),
    (Overloaded, _Row(status=429, type="rate_limit_error", code="overloaded", outcome="overloaded", retry_after_s=1)),
    (Draining, _Row(status=503, type="server_error", code="draining", outcome="unavailable", retry_after_s=5)),
    (
        EngineUnavailable,
        _Row(status=503, type="server_error", code="engine_unavailable", outcome="unavailable", retry_after_s=2),
    ),
    (DeadlineExceeded, _Row(status=504, type="timeout_error", code="deadline_exceeded", outcome="deadline")),
    (EngineError, _Row(status=500, type="server_error", code="engine_error", outcome="error")),
    (ConfigError, _Row(status=500, type="server_error", code="misconfigured", outcome="error")),
    (CheckpointError, _Row(status=500, type="server_error", code="misconfigured", outcome="error")),
)

_INTERNAL = _Row(status=500, type="server_error", code="internal_error", outcome="error")

_REFUSAL_TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}


def answer_for(error: BaseException) -> ErrorAnswer:
    """Return what a client is told about an error.

    An error that is not ours is a bug of ours: the client learns that, and not what it says.
    """
    if isinstance(error, HttpRefusal):
        kind = _REFUSAL_TYPES.get(error.status, "invalid_request_error")
        row = _Row(status=error.status, type=kind, code=error.code, outcome="refused")
        headers = {"connection": "close"} if error.closes else {}
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        return _answer(row, str(error), error.param, headers)
    row = next((row for kind, row in _TABLE if isinstance(error, kind)), _INTERNAL)
    if row is _INTERNAL:
        return _answer(row, "internal error; the server's log has the details under this request's id", None, {})
    param = _FIELD_NAMES.get(error.field, error.field) if isinstance(error, InvalidRequest) else None
    retry_after_s = error.retry_after_s if isinstance(error, BusyRefusal) else row.retry_after_s
    headers = {} if retry_after_s is None else {"retry-after": str(max(1, math.ceil(retry_after_s)))}
    return _answer(row, str(error), param, headers)


def _answer(row: _Row, message: str, param: str | None, headers: dict[str, str]) -> ErrorAnswer:
    if len(message) > MAX_MESSAGE_CHARS:
        message = f"{message[:MAX_MESSAGE_CHARS]}... ({len(message)} characters)"
    if param is not None:
        param = param[:MAX_MESSAGE_CHARS]
    # A message may quote a lone surrogate, which has no bytes.
    message = message.encode("utf-8", "backslashreplace").decode()
    body: ErrorBody = {"message": message, "type": row.type, "param": param, "code": row.code}
    return ErrorAnswer(status=row.status, outcome=row.outcome, body={"error": body}, headers=headers)
