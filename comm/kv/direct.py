"""Frames read by the receiver straight out of the sender's memory, one copy in all; words over a unix socket.

The sender says where a frame lies and leaves it there until the receiver has read it. Only the receiver writes, into
what its gate has admitted. The sender may give up meanwhile and use the memory for something else: it ends the
connection first. So the receiver's last word decides: where it can still be said, all that was read before is right.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import secrets
import socket
from collections.abc import Callable
from struct import Struct

import numpy as np

from ..errors import PeerLost
from .channel import PORTION_BYTES, Look, SocketEnd, portions
from .memory import Runs, Spans, address_of
from .places import hear_places, paired, said_places

_CREDENTIALS = Struct("3i")
_PROBE_BYTES = 32
_PROBE = Struct(f"=Q{_PROBE_BYTES}s")
PROBE_BYTES = _PROBE.size
_DONE = b"d"

Read = Callable[[int, Spans, Spans], int]
"""Reads memory of a process: into these spans, from those; returns how many bytes, or -1."""


def probe() -> tuple[bytes, bytearray]:
    """Return a sender's words by which a receiver finds out that it can read its memory, and what has to stay there."""
    token = bytearray(secrets.token_bytes(_PROBE_BYTES))
    return _PROBE.pack(address_of(memoryview(token)), token), token


def readable_peer(sock: socket.socket, words: bytes | bytearray) -> int | None:
    """Return the process at the other end of a unix socket, if its memory can be read and holds what it says."""
    read, option = _read_call, getattr(socket, "SO_PEERCRED", None)
    if read is None or option is None:
        return None
    process, _, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, option, _CREDENTIALS.size))
    address, token = _PROBE.unpack(words)
    if address >= 1 << 63:
        return None
    found = bytearray(_PROBE_BYTES)
    here = np.array([[address_of(memoryview(found)), _PROBE_BYTES]], dtype=np.int64)
    there = np.array([[address, _PROBE_BYTES]], dtype=np.int64)
    if process <= 0 or read(process, here, there) != _PROBE_BYTES or found != token:
        return None
    return int(process)


class DirectSender:
    """The end that says where frames are."""

    ahead = 2

    def __init__(self, end: SocketEnd) -> None:
        self._end = end
        self._words = memoryview(bytearray(self.ahead))
        self._unsettled = 0

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._end.fileno()

    def send(self, header: bytes, runs: Runs) -> None:
        """Say where a frame is."""
        self._unsettled += 1
        self._end.send_all(said_places(header, runs))

    def settle(self, *, wait: bool) -> int:
        """Return how many more frames were read."""
        if not self._unsettled:
            return 0
        # No more than was sent: who says more is not believed.
        settled = self._end.read_some(self._words[: self._unsettled], wait=wait)
        self._unsettled -= settled
        return settled

    def end(self) -> None:
        """End the connection; what was not read by now is not applied over there."""
        self._end.end()

    def close(self) -> None:
        """Give the descriptor back."""
        self._end.close()


class DirectReceiver:
    """The end that reads them."""

    def __init__(self, end: SocketEnd, process: int) -> None:
        self._end = end
        self._process = process

    def receive_header(self, header: bytearray) -> None:
        """Wait for the next frame's header."""
        self._end.fill_when_it_comes(header)

    def receive(self, runs: Runs, look: Look | None) -> None:
        """Fill runs with the frame's bytes."""
        count = runs.num_bytes
        there = hear_places(self._end, count)
        portion_bytes = PORTION_BYTES if look is not None else count
        shown = portions(runs, portion_bytes) if look is not None else itertools.repeat([])
        for calls, pieces in zip(paired(runs.spans, there, portion_bytes), shown, strict=False):
            for into, out_of in calls:
                self._read(into, out_of)
            for piece in pieces:
                assert look is not None
                look(piece)
        self._end.send_all([_DONE])

    def skip(self, count: int) -> None:
        """Leave a frame unread."""
        hear_places(self._end, None)
        self._end.send_all([_DONE])

    def close(self) -> None:
        """Give the descriptor back."""
        self._end.close()

    def _read(self, into: Spans, out_of: Spans) -> None:
        wanted = int(into[:, 1].sum())
        assert _read_call is not None
        found = _read_call(self._process, into, out_of)
        if found != wanted:
            why = os.strerror(ctypes.get_errno()) if found < 0 else f"{found} of {wanted} bytes were there"
            raise PeerLost(f"{self._end.peer} is gone: its memory cannot be read ({why})")


def _find_read() -> Read | None:
    """Return the system's call for reading another process's memory, where it has one."""
    try:
        call = ctypes.CDLL(None, use_errno=True).process_vm_readv
    except (OSError, AttributeError):
        return None
    size, pointer = ctypes.c_ulong, ctypes.c_void_p
    call.argtypes = (ctypes.c_int, pointer, size, pointer, size, size)
    call.restype = ctypes.c_ssize_t

    def read(process: int, into: Spans, out_of: Spans) -> int:
        return int(call(process, into.ctypes.data, len(into), out_of.ctypes.data, len(out_of), 0))

    return read


_read_call = _find_read()
