"""How the bytes of frames cross one connection: the protocol of channels, and what sockets do for all of them.

A channel goes one way, from a sender's thread to a receiver's. Sockets block, with the kernel's own time-outs: a whole
frame is one system call, made without Python's lock, and no thread waits longer for a peer than the limit.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from struct import Struct
from typing import Protocol

from ..errors import CommMisuse, CommTimeout, PeerLost
from ..wire import Clock, Deadline
from .memory import KvStore, Runs

MAX_RUNS = 1024
"""Runs of bytes in one system call; more are refused by Linux."""

PORTION_BYTES = 512 << 10
"""What is looked at soon after it was stored: it is still in the processor's caches then."""

Look = Callable[[memoryview], object]
"""Takes bytes that were stored, piece by piece, in their order."""

_TIMEVAL = Struct("ll")
_SCRATCH_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLimits:
    """Bounds of a transport made of connections.

    Units: streams, connections to each rank; max_frame_bytes, of a frame that is received; max_queued_bytes, posted and
    not released; frame_timeout_s, in which a frame crosses once it has begun; ring_bytes, of shared memory a connection
    """

    streams: int = 2
    max_frame_bytes: int = 16 << 20
    max_queued_bytes: int = 1 << 30
    meeting_timeout_s: float = 5.0
    frame_timeout_s: float = 10.0
    max_connections: int = 1024
    max_strangers: int = 64
    ring_bytes: int = 2 << 20

    def __post_init__(self) -> None:
        if self.streams < 1 or self.max_frame_bytes < 1 or not 0 < self.frame_timeout_s < 1e6:
            raise CommMisuse(f"a KV transport needs streams, frames and time for them, got {self}")
        if not 1 << 16 <= self.ring_bytes <= 1 << 30:
            raise CommMisuse(f"ring_bytes must be from 64 KiB to 1 GiB, got {self.ring_bytes}")


class ChannelOut(Protocol):
    """The sending end of one connection, after both ends have met. ``ahead``: frames that may be unsettled at once."""

    ahead: int

    def fileno(self) -> int:
        """The descriptor that says when the connection ends."""
        ...

    def send(self, header: bytes, runs: Runs) -> None:
        """Send a frame; its memory is read until it is settled, or this end was ended. Raises: PeerLost, CommTimeout"""
        ...

    def settle(self, *, wait: bool) -> int:
        """Return how many more frames, in their order, are sent and no longer read; ``wait``: for one at least.

        Raises: PeerLost, CommTimeout
        """
        ...

    def end(self) -> None:
        """End the connection, from any thread; whoever waits on it has PeerLost."""
        ...

    def close(self) -> None:
        """Give everything back; nobody may be using it."""
        ...


class ChannelIn(Protocol):
    """The receiving end."""

    def receive_header(self, header: bytearray) -> None:
        """Wait for the next frame and fill its header, for as long as the peer has nothing to say.

        Raises: PeerLost, CommTimeout when it stops half-way
        """
        ...

    def receive(self, runs: Runs, look: Look | None) -> None:
        """Fill runs with the frame's bytes, and show them to ``look``. Raises: PeerLost, CommTimeout, BadFrame"""
        ...

    def skip(self, count: int) -> None:
        """Read over a frame's bytes. Raises: PeerLost, CommTimeout"""
        ...

    def close(self) -> None:
        """Give everything back; nobody may be using it."""
        ...


class Carrier(Protocol):
    """A kind of channel, made of connected sockets whose ends have met. Raises: PeerLost, CommTimeout"""

    def check_address(self, address: str, *, across_hosts: bool) -> None:
        """Make sure that peers, on other hosts if so, can come to this address. Raises: CommMisuse"""
        ...

    def register(self, memory: KvStore) -> None:
        """Get ready to move bytes from and to this memory, once, before any channel. Raises: CommMisuse"""
        ...

    def close(self) -> None:
        """Give back what was needed for the memory; all channels are closed."""
        ...

    def channel_to(self, sock: socket.socket, *, peer: str, limits: StreamLimits, clock: Clock) -> ChannelOut:
        """Return the sending end."""
        ...

    def channel_from(self, sock: socket.socket, *, peer: str, limits: StreamLimits, clock: Clock) -> ChannelIn:
        """Return the receiving end."""
        ...


class PlainCarrier:
    """A carrier that needs to know nothing of memory."""

    def register(self, memory: KvStore) -> None:
        """Nothing: channels are told where bytes are."""

    def close(self) -> None:
        """Nothing."""


class SocketEnd:
    """A connected socket whose every wait ends; ``peer`` is what errors call the other end."""

    def __init__(self, sock: socket.socket, *, peer: str, frame_timeout_s: float, clock: Clock) -> None:
        self.peer = peer
        self._sock = sock
        self._timeout_s = frame_timeout_s
        self._clock = clock
        self._scratch: bytearray | None = None
        sock.settimeout(None)
        whole_s = int(frame_timeout_s)
        wait = _TIMEVAL.pack(whole_s, int((frame_timeout_s - whole_s) * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, option, wait)

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._sock.fileno()

    def send_all(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Send buffers, one after the other, as few system calls as can be."""
        deadline: Deadline | None = None
        at = 0
        while at < len(buffers):
            batch = buffers[at : at + MAX_RUNS]
            at += len(batch)
            left = sum(map(len, batch))
            while True:
                sent = self._send(batch)
                left -= sent
                if not left:
                    break
                # Only where the kernel gave up waiting for the peer.
                deadline = self._still_in_time(deadline)
                batch = _rest(batch, sent)

    def fill(self, runs: Sequence[memoryview]) -> None:
        """Fill runs, one after the other."""
        deadline: Deadline | None = None
        at = 0
        while at < len(runs):
            batch: Sequence[bytes | memoryview] = runs[at : at + MAX_RUNS]
            at += len(batch)
            left = sum(map(len, batch))
            while True:
                count = self._receive(batch)
                if count is None:
                    raise CommTimeout(f"{self.peer} stopped within a KV frame for {self._timeout_s:g} s")
                left -= count
                if not left:
                    break
                deadline = self._still_in_time(deadline)
                batch = _rest(batch, count)

    def read_some(self, buffer: memoryview, *, wait: bool = True) -> int:
        """Read as many bytes as are there and have room; ``wait``: for one at least."""
        count = self._receive([buffer], flags=0 if wait else socket.MSG_DONTWAIT)
        if count is None:
            if not wait:
                return 0
            raise CommTimeout(f"{self.peer} stopped within a KV frame for {self._timeout_s:g} s")
        return count

    def fill_when_it_comes(self, buffer: bytearray) -> None:
        """Fill a buffer, waiting for its first byte for as long as the peer lives."""
        view = memoryview(buffer)
        while (count := self._receive([view])) is None:
            continue
        if count < len(view):
            self.fill([view[count:]])

    def read_over(self, count: int) -> None:
        """Read bytes and forget them."""
        if self._scratch is None:
            self._scratch = bytearray(_SCRATCH_BYTES)
        view = memoryview(self._scratch)
        while count:
            part = view[: min(count, _SCRATCH_BYTES)]
            self.fill([part])
            count -= len(part)

    def end(self) -> None:
        """End the connection in both directions."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the descriptor back."""
        self.end()
        self._sock.close()

    def _send(self, batch: Sequence[bytes | memoryview]) -> int:
        try:
            return self._sock.sendmsg(batch)
        except BlockingIOError as error:
            raise CommTimeout(f"{self.peer} takes no KV for {self._timeout_s:g} s") from error
        except OSError as error:
            raise PeerLost(f"{self.peer} is gone: {error}") from error

    def _receive(self, batch: Sequence[memoryview | bytes], *, flags: int = socket.MSG_WAITALL) -> int | None:
        """Return the bytes that came, None when none came in time."""
        try:
            count = self._sock.recvmsg_into(batch, 0, flags)[0]
        except BlockingIOError:
            return None
        except OSError as error:
            raise PeerLost(f"{self.peer} is gone: {error}") from error
        if count == 0:
            raise PeerLost(f"{self.peer} is gone: its connection ended")
        return count

    def _still_in_time(self, deadline: Deadline | None) -> Deadline:
        """Bound a frame as a whole: a peer that takes or gives a byte now and then is hung too."""
        if deadline is None:
            return Deadline(self._timeout_s, self._clock)
        if not deadline.remaining_s:
            raise CommTimeout(f"{self.peer} is too slow: a KV frame takes more than {self._timeout_s:g} s")
        return deadline


def portions(runs: Sequence[memoryview], most_bytes: int) -> Iterator[list[memoryview]]:
    """Divide runs into portions of so many bytes, one after the other; the last may have fewer."""
    pieces: list[memoryview] = []
    room = most_bytes
    for run in runs:
        while len(run) > room:
            # None that is empty: read alone, it would look like the end of a connection.
            yield [*pieces, run[:room]] if room else pieces
            run, pieces, room = run[room:], [], most_bytes
        if len(run):
            pieces.append(run)
            room -= len(run)
    if pieces:
        yield pieces


def _rest(batch: Sequence[bytes | memoryview], done: int) -> list[bytes | memoryview]:
    """Return what is left of some buffers after so many bytes."""
    for index, part in enumerate(batch):
        if done < len(part):
            return [memoryview(part)[done:], *batch[index + 1 :]]
        done -= len(part)
    return []
