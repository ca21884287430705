"""The end of a link from which bytes come: answers one measurement, then is gone.

    stream 0         every message is sent back
    streams 1 to N   bytes without meaning, until there were enough of them or the measurer leaves

Each stream can be taken once. Strangers may connect and are sent away; connections, bytes and time are bounded.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from ...comm.errors import CommMisuse, HandshakeRefused
from ...comm.handshake import DriverHandshake
from ...comm.sockets import listen
from ..clock import Clock, monotonic_clock
from .link_wire import (
    BUFFER_BYTES,
    ECHO,
    HANDSHAKE_S,
    ProbeLimits,
    ProbeRefused,
    ProbeTimeout,
    ProbeUnreachable,
    hang_up,
    identity_of,
    prepare,
    read,
    receive,
    send,
)

_LOOK_S = 0.1
"""How often who waits for connections looks whether it is to end."""

_MOST_STRANGERS = 16


class LinkListener:
    """Listens as long as its limits say, or until it is closed."""

    def __init__(self, address: str, token: str, limits: ProbeLimits, *, clock: Clock = monotonic_clock) -> None:
        """Listen at host:port; port 0 is any that is free. Raises: ProbeUnreachable when nobody can listen there"""
        self._identity = identity_of(token)
        self._limits = limits
        self._clock = clock
        self._deadline_s = clock() + limits.timeout_s
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._taken: set[int] = set()
        self._connections: dict[socket.socket, threading.Thread] = {}
        try:
            self._socket, self.address = listen(address)
        except CommMisuse as error:
            raise ProbeUnreachable(str(error)) from error
        self._socket.settimeout(_LOOK_S)
        self._acceptor = threading.Thread(target=self._accept, name="slipstream-link-listener", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """End it, and every connection. Idempotent."""
        self._closing.set()
        self._acceptor.join(HANDSHAKE_S)
        # From here on there are no new ones.
        with self._lock:
            left = dict(self._connections)
        for connection in left:
            hang_up(connection)
        for thread in left.values():
            thread.join(HANDSHAKE_S)

    def _accept(self) -> None:
        with self._socket:
            while not self._closing.is_set() and self._clock() < self._deadline_s:
                try:
                    connection, _ = self._socket.accept()
                except OSError:
                    # Nobody came, or who came has gone already.
                    continue
                thread = threading.Thread(
                    target=self._serve, args=(connection,), name="slipstream-link-stream", daemon=True
                )
                with self._lock:
                    full = len(self._connections) > self._limits.streams + _MOST_STRANGERS
                    if not full:
                        self._connections[connection] = thread
                if full:
                    connection.close()
                else:
                    thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, suppress(OSError, ProbeTimeout):
                stream = self._admit(connection)
                if stream == ECHO:
                    self._echo(connection)
                elif stream is not None:
                    self._pour(connection)
        finally:
            with self._lock:
                del self._connections[connection]

    def _admit(self, connection: socket.socket) -> int | None:
        """Return the stream that who has connected may have; None for none, and it has been told."""
        prepare(connection, timeout_s=HANDSHAKE_S)
        handshake = DriverHandshake(self._identity)
        send(connection, handshake.challenge())
        try:
            stream, welcome = handshake.check(receive(connection))
            with self._lock:
                if stream in self._taken or stream > self._limits.streams:
                    raise ProbeRefused(f"stream {stream} is not to be had")
                self._taken.add(stream)
        except (HandshakeRefused, ProbeRefused):
            send(connection, b"")
            return None
        send(connection, welcome)
        return stream

    def _echo(self, connection: socket.socket) -> None:
        message = bytearray(self._limits.exchange_bytes)
        for _ in range(self._limits.exchanges):
            connection.settimeout(self._left_s())
            read(connection, memoryview(message))
            connection.sendall(message)

    def _pour(self, connection: socket.socket) -> None:
        left, chunk = -(-self._limits.max_bytes // self._limits.streams), memoryview(bytes(BUFFER_BYTES))
        while left > 0:
            connection.settimeout(self._left_s())
            left -= connection.send(chunk[: min(left, BUFFER_BYTES)])

    def _left_s(self) -> float:
        left_s = self._deadline_s - self._clock()
        if left_s <= 0 or self._closing.is_set():
            raise ProbeTimeout("the listener's time is over")
        return left_s
