"""KV between processes of one host: bytes go through a ring of shared memory, words over a unix socket.

The receiver makes the ring, so it decides how much memory a connection may take, and hands its descriptor over: the
memory has no name that could be left behind, and cannot shrink under either end. The sender fills a slot and says so;
the receiver copies it on into its blocks and gives the slot back. Both copies run at once, and the ring stays in the
processor's cache, so that it costs little over one copy; and the receiver's gate holds here as it does over a network.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress

from ..errors import BadFrame, CommMisuse, CommTimeout, PeerLost
from ..wire import Clock
from .channel import SocketEnd, StreamLimits

SLOTS = 4
_ASK = b"r"
_FULL = b"f"
_FREE = b"e"
_LARGEST_RING = 1 << 30


class ShmSender:
    """The end that fills slots."""

    def __init__(self, end: SocketEnd, ring: mmap.mmap) -> None:
        self._end = end
        self._ring = ring
        self._view = memoryview(ring)
        self._slot_bytes = len(ring) // SLOTS
        self._free = SLOTS
        self._at = 0
        self._credits = bytearray(SLOTS)

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._end.fileno()

    def send(self, header: bytes, runs: Sequence[memoryview]) -> None:
        """Send a frame."""
        ahead = header
        for pieces in _slots(runs, self._slot_bytes):
            if not self._free:
                self._free = self._end.read_some(memoryview(self._credits))
            at = self._at * self._slot_bytes
            for piece in pieces:
                self._view[at : at + len(piece)] = piece
                at += len(piece)
            self._free -= 1
            self._at = (self._at + 1) % SLOTS
            self._end.send_all([ahead + _FULL])
            ahead = b""

    def end(self) -> None:
        """End the connection."""
        self._end.end()

    def close(self) -> None:
        """Give descriptor and mapping back."""
        self._end.close()
        # A piece of it that is still held somewhere gives it back when that goes.
        with suppress(BufferError):
            self._view.release()
            self._ring.close()


class ShmReceiver:
    """The end that empties slots."""

    def __init__(self, end: SocketEnd, ring: mmap.mmap) -> None:
        self._end = end
        self._ring = ring
        self._view = memoryview(ring)
        self._slot_bytes = len(ring) // SLOTS
        self._at = 0
        self._words = memoryview(bytearray(SLOTS))

    def receive_header(self, header: bytearray) -> None:
        """Wait for the next frame's header."""
        self._end.fill_when_it_comes(header)

    def receive(self, runs: Sequence[memoryview]) -> None:
        """Fill runs with the frame's bytes."""
        slots = self._slots_of(sum(map(len, runs)))
        for at, pieces in zip(slots, _slots(runs, self._slot_bytes), strict=True):
            for piece in pieces:
                piece[:] = self._view[at : at + len(piece)]
                at += len(piece)

    def skip(self, count: int) -> None:
        """Give the frame's slots back unread."""
        for _ in self._slots_of(count):
            continue

    def close(self) -> None:
        """Give descriptor and mapping back."""
        self._end.close()
        # A piece of it that is still held somewhere gives it back when that goes.
        with suppress(BufferError):
            self._view.release()
            self._ring.close()

    def _slots_of(self, count: int) -> Iterator[int]:
        """Yield where each slot of so many bytes begins, once it is full; asking for the next gives it back."""
        left, full = -(-count // self._slot_bytes), 0
        while left:
            if not full:
                # No more than this frame's: what comes after them is the next one's header.
                words = self._words[: min(left, SLOTS)]
                full = self._end.read_some(words)
                if words[:full] != _FULL * full:
                    raise BadFrame(f"{self._end.peer} does not keep to slots of shared memory")
            yield self._at * self._slot_bytes
            self._at = (self._at + 1) % SLOTS
            self._end.send_all([_FREE])
            left -= 1
            full -= 1


class Shm:
    """How streams make channels of unix sockets and rings."""

    def check_address(self, address: str, *, across_hosts: bool) -> None:
        """Make sure that both ends are on one host."""
        if across_hosts or not address.startswith("unix:"):
            raise CommMisuse(f"KV at {address} cannot go through shared memory: that is of one host, at unix:/path")

    def channel_to(self, sock: socket.socket, *, peer: str, limits: StreamLimits, clock: Clock) -> ShmSender:
        """Return the sending end: ask for the ring and map it."""
        end = SocketEnd(sock, peer=peer, frame_timeout_s=limits.frame_timeout_s, clock=clock)
        end.send_all([_ASK])
        try:
            _, descriptors, _, _ = socket.recv_fds(sock, 1, 1)
        except BlockingIOError as error:
            raise CommTimeout(f"{peer} hands over no shared memory") from error
        except OSError as error:
            raise PeerLost(f"{peer} is gone: {error}") from error
        if len(descriptors) != 1:
            raise PeerLost(f"{peer} handed over no shared memory")
        try:
            return ShmSender(end, _mapped(descriptors[0], peer))
        finally:
            os.close(descriptors[0])

    def channel_from(self, sock: socket.socket, *, peer: str, limits: StreamLimits, clock: Clock) -> ShmReceiver:
        """Return the receiving end: make the ring and hand it over."""
        end = SocketEnd(sock, peer=peer, frame_timeout_s=limits.frame_timeout_s, clock=clock)
        word = bytearray(1)
        end.fill([memoryview(word)])
        descriptor = _shared_memory(limits.ring_bytes - limits.ring_bytes % (SLOTS * mmap.PAGESIZE))
        try:
            socket.send_fds(sock, [_ASK], [descriptor])
            return ShmReceiver(end, mmap.mmap(descriptor, 0))
        except OSError as error:
            raise PeerLost(f"{peer} is gone: {error}") from error
        finally:
            os.close(descriptor)


def _slots(runs: Sequence[memoryview], slot_bytes: int) -> Iterator[list[memoryview]]:
    """Divide runs into what one slot holds after the other; all but the last are full."""
    pieces: list[memoryview] = []
    room = slot_bytes
    for run in runs:
        while len(run) > room:
            pieces.append(run[:room])
            yield pieces
            run, pieces, room = run[room:], [], slot_bytes
        if len(run):
            pieces.append(run)
            room -= len(run)
    if pieces:
        yield pieces


def _shared_memory(size: int) -> int:
    """Return a descriptor of memory without a name, which cannot change its size where the system can promise that."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("slipstream-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return descriptor
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), size)
        return os.dup(file.fileno())


def _mapped(descriptor: int, peer: str) -> mmap.mmap:
    """Map a ring that somebody else made, if it is one."""
    size = os.fstat(descriptor).st_size
    sealed = True
    if hasattr(fcntl, "F_GET_SEALS"):
        sealed = False
        # What cannot be asked is no memory of the kind that was promised.
        with suppress(OSError):
            sealed = bool(fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    if not sealed or not 0 < size <= _LARGEST_RING or size % SLOTS:
        raise BadFrame(f"{peer} hands over shared memory of {size} bytes that cannot be a ring")
    return mmap.mmap(descriptor, size)
