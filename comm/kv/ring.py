"""Frames through a ring of shared memory, with words over a unix socket that say which of its slots are full.

The receiver makes the ring, so it decides how much memory a connection may take, and hands its descriptor over: the
memory has no name that could be left behind, and cannot shrink under either end. The sender fills a slot and says so;
the receiver copies it on into its blocks and gives the slot back: every byte is copied twice.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress

from ..errors import BadFrame
from .channel import Look, SocketEnd, portions
from .memory import Runs

SLOTS = 4
_FULL = b"f"
_FREE = b"e"
_LARGEST_RING = 1 << 30


class RingSender:
    """The end that fills slots."""

    ahead = 1

    def __init__(self, end: SocketEnd, ring: mmap.mmap) -> None:
        self._end = end
        self._ring = ring
        self._view = memoryview(ring)
        self._slot_bytes = len(ring) // SLOTS
        self._free = SLOTS
        self._at = 0
        self._settled = 0
        self._credits = bytearray(SLOTS)

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._end.fileno()

    def send(self, header: bytes, runs: Runs) -> None:
        """Send a frame: it is in the ring when this returns."""
        ahead = header
        for pieces in portions(runs, self._slot_bytes):
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
        self._settled += 1

    def settle(self, *, wait: bool) -> int:
        """Return how many frames were sent since the last time."""
        settled, self._settled = self._settled, 0
        return settled

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


class RingReceiver:
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

    def receive(self, runs: Runs, look: Look | None) -> None:
        """Fill runs with the frame's bytes."""
        slots = self._slots_of(runs.num_bytes)
        for at, pieces in zip(slots, portions(runs, self._slot_bytes), strict=True):
            for piece in pieces:
                piece[:] = self._view[at : at + len(piece)]
                at += len(piece)
                if look is not None:
                    look(piece)

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


def new_ring(ring_bytes: int) -> int:
    """Return a descriptor of memory without a name, which cannot change its size where the system can promise that."""
    size = ring_bytes - ring_bytes % (SLOTS * mmap.PAGESIZE)
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("slipstream-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return descriptor
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), size)
        return os.dup(file.fileno())


def mapped_ring(descriptor: int, peer: str) -> mmap.mmap:
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
