"""A short way for streams: from an event to its socket, without the layers between.

A piece of a stream goes through every middleware's ``send`` otherwise, one coroutine each, and none of them does
anything with it. Owns the ``BodyWriter`` that an answer finds in its scope; where another server runs the application,
there is none and pieces go the long way.
"""

from __future__ import annotations

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

_SCOPE_KEY = "slipstream.body_writer"


class BodyWriter:
    """Writes pieces of one answer's body, between its start and its last piece, which both go through ``send``.

    The answer must have no ``content-length``: each piece is written as a chunk of its own (RFC 9112, section 7.1).
    """

    __slots__ = ("_flow", "_transport")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        # Not the cycle itself: it has the scope, the scope this, and only the garbage collector would free them.
        self._transport = cycle.transport
        self._flow = cycle.flow

    @property
    def keeps_up(self) -> bool:
        """Whether the client is there and has read enough of what was written; if not, ``drain`` first."""
        return not (self._flow.write_paused or self._transport.is_closing())

    def write(self, piece: bytes) -> None:
        """Write a piece; nothing when the client has gone away."""
        if not self._transport.is_closing():
            self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))

    async def drain(self) -> None:
        """Wait until the client has read enough of what was written, or has gone away."""
        if self._flow.write_paused:
            await self._flow.drain()


def leave_body_writer(scope: Scope, cycle: RequestResponseCycle) -> None:
    """Put a writer of the answer to a request into its scope, before the application runs."""
    scope["extensions"] = {_SCOPE_KEY: BodyWriter(cycle)}


def body_writer(scope: Scope) -> BodyWriter | None:
    """Return the writer of the answer to the request of a scope, None when another server runs it."""
    writer: BodyWriter | None = scope.get("extensions", {}).get(_SCOPE_KEY)
    return writer
