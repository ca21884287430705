"""How the errors of a session travel: one table for the wire, one for gRPC's own status.

    EngineUnavailable
    └── SecretRefused     caller and server do not share a secret            blame: us, not retryable
    SlipstreamError
    └── WatchLost         nobody who publishes views can be heard            blame: peer, retryable

error                 on the wire          gRPC status
InvalidRequest        INVALID_REQUEST      INVALID_ARGUMENT
Overloaded            OVERLOADED           RESOURCE_EXHAUSTED
DeadlineExceeded      DEADLINE_EXCEEDED    DEADLINE_EXCEEDED
EngineUnavailable     UNAVAILABLE          UNAVAILABLE
SecretRefused                              UNAUTHENTICATED
KvMismatch                                 FAILED_PRECONDITION
EngineError           ENGINE_ERROR         INTERNAL          also whatever else is ours
"""

from __future__ import annotations

from typing import ClassVar

import grpc

from ...comm.errors import KvMismatch
from ...sdk.errors import (
    Blame,
    DeadlineExceeded,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
    Overloaded,
    SlipstreamError,
)
from .generated import engine_pb2 as pb

MAX_PROBLEM_CHARS = 2048
MAX_FIELD_CHARS = 128


class SecretRefused(EngineUnavailable):
    """One of two does not know the cluster's secret: trying again helps only when somebody has set it."""

    retryable: ClassVar[bool] = False
    blame: ClassVar[Blame] = Blame.US


class WatchLost(SlipstreamError):
    """The publisher of views cannot be reached, or has fallen silent."""

    retryable: ClassVar[bool] = True
    blame: ClassVar[Blame] = Blame.PEER


_PLAIN: dict[pb.ErrorKind, type[Overloaded | DeadlineExceeded | EngineUnavailable | EngineError]] = {
    pb.ERROR_KIND_OVERLOADED: Overloaded,
    pb.ERROR_KIND_DEADLINE_EXCEEDED: DeadlineExceeded,
    pb.ERROR_KIND_UNAVAILABLE: EngineUnavailable,
    pb.ERROR_KIND_ENGINE_ERROR: EngineError,
}

_STATUS: dict[type[SlipstreamError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    EngineUnavailable: grpc.StatusCode.UNAVAILABLE,
    SecretRefused: grpc.StatusCode.UNAUTHENTICATED,
}


def status_of(error: SlipstreamError | KvMismatch) -> grpc.StatusCode:
    """Return the gRPC status that says what an error says."""
    if isinstance(error, KvMismatch):
        return grpc.StatusCode.FAILED_PRECONDITION
    return _STATUS.get(type(error), grpc.StatusCode.INTERNAL)


def error_to_wire(error: SlipstreamError) -> pb.Error:
    """Return an error as a message; texts are cut to their limits."""
    if isinstance(error, InvalidRequest):
        kind, field, problem = pb.ERROR_KIND_INVALID_REQUEST, error.field, error.problem
    else:
        kinds = [kind for kind, known in _PLAIN.items() if isinstance(error, known)]
        kind, field, problem = (kinds or [pb.ERROR_KIND_ENGINE_ERROR])[0], "", str(error)
    return pb.Error(
        kind=kind,
        field=_plain_text(field, MAX_FIELD_CHARS),
        problem=_plain_text(problem, MAX_PROBLEM_CHARS),
        retryable=error.retryable,
    )


def error_from_wire(message: pb.Error) -> SlipstreamError:
    """Return the error that a message stands for; an unknown kind is a fault of the engine."""
    field, problem = message.field[:MAX_FIELD_CHARS], message.problem[:MAX_PROBLEM_CHARS]
    if message.kind == pb.ERROR_KIND_INVALID_REQUEST:
        return InvalidRequest(field, problem)
    return _PLAIN.get(message.kind, EngineError)(problem)


def _plain_text(text: str, limit: int) -> str:
    """Return what protobuf can carry: a half of a surrogate pair, quoted from a caller's text, is not UTF-8."""
    return text[:limit].encode("utf-8", "backslashreplace").decode()
