"""What the two ends of a link's measurement share: what it may cost, how they meet, and what can go wrong.

Both know a token that was made for this one measurement, and prove it to one another (``comm.handshake``) before
anything else is sent. Of what a stranger sends, one bounded message is read.

    ProbeError              blame: peer, retryable
    ├── ProbeUnreachable    nobody answers at the address, or the connection broke
    ├── ProbeRefused        who answers, or who came, does not have the token
    └── ProbeTimeout        it was not over in its time
"""

from __future__ import annotations

import socket
from contextlib import suppress
from dataclasses import dataclass

from ...comm.errors import HandshakeRefused
from ...comm.handshake import MAX_MESSAGE_BYTES, Identity
from ...sdk.errors import Blame, SlipstreamError

ECHO = 0
"""The stream on which messages are sent back; on those above it bytes come."""

HANDSHAKE_S = 3.0
BUFFER_BYTES = 1 << 18
_WHAT = "measure-links"
_LENGTH_BYTES = 2


class ProbeError(SlipstreamError):
    """A link could not be measured."""

    retryable = True
    blame = Blame.PEER


class ProbeUnreachable(ProbeError):
    """Nobody answers at the address, or the connection broke."""


class ProbeRefused(ProbeError):
    """Who is at the other end does not have the measurement's token."""


class ProbeTimeout(ProbeError):
    """A measurement was not over in its time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeLimits:
    """How much a measurement may cost, for one direction.

    ``streams``: connections that bytes come over at once. ``exchanges``: of small messages, at most.
    Units: seconds, that bytes are received, and at most that messages go back and forth; max_bytes, to be sent;
    timeout_s, for all of it

    Raises: ValueError naming the field
    """

    streams: int = 4
    seconds: float = 1.0
    max_bytes: int = 8 << 30
    exchanges: int = 400
    exchange_bytes: int = 64
    timeout_s: float = 15.0

    def __post_init__(self) -> None:
        for name, most in (("streams", 64), ("exchanges", 100_000), ("exchange_bytes", 65_536), ("max_bytes", 1 << 40)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name}: must be between 1 and {most}, got {getattr(self, name)}")
        if not 0 < self.seconds <= 600:
            raise ValueError(f"seconds: must be above 0 and at most 600, got {self.seconds}")
        if self.timeout_s <= 2 * self.seconds:
            raise ValueError(f"timeout_s: must be more than twice seconds ({self.seconds}), got {self.timeout_s}")


def identity_of(token: str) -> Identity:
    """Return what both ends prove to one another."""
    return Identity(replica=_WHAT, secret=token.encode())


def prepare(connection: socket.socket, *, timeout_s: float) -> None:
    """Set a connection up: messages leave at once, no wait is for ever."""
    connection.settimeout(timeout_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def hang_up(connection: socket.socket) -> None:
    """End a connection; who waits on it wakes up."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def send(connection: socket.socket, message: bytes) -> None:
    """Send a message of the handshake."""
    connection.sendall(len(message).to_bytes(_LENGTH_BYTES, "big") + message)


def receive(connection: socket.socket) -> bytes:
    """Return a message of the handshake. Raises: HandshakeRefused when it is too long; OSError"""
    head = bytearray(_LENGTH_BYTES)
    read(connection, memoryview(head))
    length = int.from_bytes(head, "big")
    if length > MAX_MESSAGE_BYTES:
        raise HandshakeRefused(f"a message of {length} bytes")
    body = bytearray(length)
    read(connection, memoryview(body))
    return bytes(body)


def read(connection: socket.socket, into: memoryview) -> None:
    """Fill a buffer. Raises: OSError, also when the other end hangs up before"""
    while into:
        count = connection.recv_into(into)
        if not count:
            raise ConnectionError("the other end hung up")
        into = into[count:]
