"""What the sockets of this machine can do: bytes over several connections, with nothing else done to them.

Two kinds: as iperf does, from one small buffer into one small buffer, which stay in the processor's cache; and from
and into memory of the same size as what is moved, ``walk``.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence

BUFFER_BYTES = 1 << 20
_WORD = b"d"


class RawListener:
    """The reading side."""

    def __init__(self, layers: Sequence[memoryview]) -> None:
        self._layers = layers
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]

    def receive(self, streams: int, count: int, *, walk: bool) -> None:
        """Accept connections, read their shares, and say so on each."""
        threads = []
        for index in range(streams):
            sock, _ = self._socket.accept()
            pieces = pieces_of(self._layers if walk else None, count, index, streams)
            threads.append(threading.Thread(target=_read, args=(sock, pieces)))
            threads[-1].start()
        for thread in threads:
            thread.join()


class RawSender:
    """The writing side, connected."""

    def __init__(self, port: int, streams: int, layers: Sequence[memoryview]) -> None:
        self._layers = layers
        self._sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(streams)]

    def send(self, count: int, *, walk: bool) -> None:
        """Send so many bytes over all connections, and wait until they are read."""
        streams = len(self._sockets)
        threads = [
            threading.Thread(
                target=_write, args=(sock, pieces_of(self._layers if walk else None, count, index, streams))
            )
            for index, sock in enumerate(self._sockets)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def close(self) -> None:
        """End the connections."""
        for sock in self._sockets:
            sock.close()


def pieces_of(layers: Sequence[memoryview] | None, count: int, index: int, streams: int) -> list[memoryview]:
    """Return where a stream's bytes are, piece by piece: in one small buffer, or its share of all memory."""
    if layers is None:
        own = memoryview(bytearray(BUFFER_BYTES))
        return [own[: min(BUFFER_BYTES, count // streams - at)] for at in range(0, count // streams, BUFFER_BYTES)]
    part = count // len(layers)
    size = min(BUFFER_BYTES, part)
    pieces = [layer[at : min(at + size, part)] for layer in layers for at in range(0, part, size)]
    return pieces[index::streams]


def _read(sock: socket.socket, pieces: Sequence[memoryview]) -> None:
    with sock:
        for piece in pieces:
            got = sock.recv_into(piece, len(piece), socket.MSG_WAITALL)
            assert got == len(piece), "the sender ended"
        sock.sendall(_WORD)


def _write(sock: socket.socket, pieces: Sequence[memoryview]) -> None:
    for piece in pieces:
        sock.sendall(piece)
    assert sock.recv(1) == _WORD
