"""One connected socket that moves frames and never blocks, and the limits and deadlines of those who wait on it.

What the kernel does not take at once is kept, in order, and goes out with ``flush``. Whoever owns a wire decides when
to wait, and for how long. Not for several threads at once: one may send while another receives.
"""

from __future__ import annotations

import math
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from .errors import CommMisuse, PeerLost
from .frames import HEADER, Frame, FrameKind, FrameReader
from .sockets import prepare

Clock = Callable[[], float]
"""Returns seconds, monotonic."""

_LONGEST_POLL_MS = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BusLimits:
    """Bounds of a step bus; both ends have the same.

    Units: max_ahead, steps sent whose results have not been collected; max_unsent_bytes, kept for one rank when its
    socket is full (a rank that has none waiting may be sent any step); stall_timeout_s, how long a peer may take no
    byte of what waits for it
    """

    max_payload_bytes: int = 256 << 20
    max_ahead: int = 8
    max_unsent_bytes: int = 64 << 20
    stall_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if not 1 <= self.max_payload_bytes < 1 << 32:
            raise CommMisuse(f"max_payload_bytes must be at least 1 and below 4 GiB, got {self.max_payload_bytes}")
        if self.max_ahead < 1:
            raise CommMisuse(f"max_ahead must be at least 1, got {self.max_ahead}")


class Deadline:
    """A moment by which a wait ends."""

    def __init__(self, timeout_s: float, clock: Clock) -> None:
        self.timeout_s = timeout_s
        self._clock = clock
        self._end_s = clock() + timeout_s

    @property
    def remaining_s(self) -> float:
        """Seconds left, never negative."""
        return max(self._end_s - self._clock(), 0.0)

    @property
    def remaining_ms(self) -> int:
        """Milliseconds left for ``poll``, rounded up, so that no wait ends just before its deadline."""
        return min(math.ceil(self.remaining_s * 1e3), _LONGEST_POLL_MS)


class Wire:
    """A connection to one peer; ``peer`` is what errors call it."""

    def __init__(self, sock: socket.socket, *, peer: str, max_payload_bytes: int) -> None:
        prepare(sock)
        self.peer = peer
        self._sock = sock
        self._reader = FrameReader(max_payload_bytes=max_payload_bytes)
        self._unsent: deque[memoryview] = deque()
        self.unsent_bytes = 0

    def fileno(self) -> int:
        """The socket's descriptor, for poll and select."""
        return self._sock.fileno()

    def allow(self, max_payload_bytes: int) -> None:
        """Change the limit of frames that are received from now on."""
        self._reader.max_payload_bytes = max_payload_bytes

    def send(self, kind: FrameKind, seq: int, payload: bytes) -> None:
        """Send a frame: in one write when the socket has room, else as much as fits now.

        Raises: PeerLost
        """
        header = HEADER.pack(len(payload), kind, seq)
        if self._unsent:
            self._keep(memoryview(header))
            self._keep(memoryview(payload))
            return
        try:
            sent = self._sock.sendmsg([header, payload])
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise self._lost(error) from error
        if sent < len(header) + len(payload):
            self._keep(memoryview(header)[sent:])
            self._keep(memoryview(payload)[max(sent - len(header), 0) :])

    def flush(self) -> None:
        """Send what was kept, as much as the socket takes now.

        Raises: PeerLost
        """
        while self._unsent:
            part = self._unsent[0]
            try:
                sent = self._sock.send(part)
            except BlockingIOError:
                return
            except OSError as error:
                raise self._lost(error) from error
            self.unsent_bytes -= sent
            if sent < len(part):
                self._unsent[0] = part[sent:]
            else:
                self._unsent.popleft()

    def receive(self) -> bool:
        """Read once what is there; return False when there was nothing.

        Raises: PeerLost when the peer ended
        """
        try:
            count = self._sock.recv_into(self._reader.space())
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._lost(error) from error
        if count == 0:
            raise PeerLost(f"{self.peer} is gone: its connection ended")
        self._reader.advance(count)
        return True

    def take(self) -> Frame | None:
        """Return the next whole frame of what was read.

        Raises: BadFrame
        """
        return self._reader.take()

    def end(self) -> None:
        """End the connection in both directions, from any thread: who polls it here or there is woken.

        What is in the socket still arrives, what was kept here does not.
        """
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the descriptor back; nobody may be polling it."""
        self.end()
        self._sock.close()

    def _keep(self, part: memoryview) -> None:
        if len(part):
            self._unsent.append(part)
            self.unsent_bytes += len(part)

    def _lost(self, error: OSError) -> PeerLost:
        return PeerLost(f"{self.peer} is gone: {error}")
