"""The connections over which a driver orders the KV of its other ranks about: what both of their ends have.

    rank → driver   hello, as on the step bus, then ``OFFER``: where the rank takes KV in
    driver → rank   ``ORDER``, time and again
    rank → driver   ``REPORT``, time and again

Neither end ever waits for the other: what does not fit into a socket is kept, up to a bound, and goes out when there is
room. An end that takes nothing for too long is lost, and with it the replica.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from dataclasses import dataclass

from ...comm.errors import CommTimeout
from ...comm.frames import FrameKind
from ...comm.handshake import Identity
from ...comm.wire import Clock, Wire

MAX_UNSENT_BYTES = 64 << 20
STALL_TIMEOUT_S = 30.0
LOOK_MS = 1000
"""How often an end that has something unsent looks whether it goes on."""


def control_identity(identity: Identity) -> Identity:
    """Return what both ends prove; no other connection of the replica takes it."""
    return Identity(replica=f"kv-ranks/{identity.replica}", secret=identity.secret)


class Bell:
    """Wakes a thread that polls it; may be rung from any thread, and never waits."""

    def __init__(self) -> None:
        self._ringing, self._heard = socket.socketpair()
        for sock in (self._ringing, self._heard):
            sock.setblocking(False)

    def fileno(self) -> int:
        """The descriptor to poll."""
        return self._heard.fileno()

    def ring(self) -> None:
        """Wake the thread, or have it not go to sleep."""
        # Full: it is awake already. Closed: nobody sleeps there any more.
        with suppress(OSError):
            self._ringing.send(b"x")

    def hear(self) -> None:
        """Take the ringing in."""
        with suppress(BlockingIOError):
            while self._heard.recv(4096):
                continue

    def close(self) -> None:
        """Give the descriptors back."""
        self._ringing.close()
        self._heard.close()


@dataclass(slots=True, eq=False)
class ControlWire:
    """One connection, and since when it has taken nothing."""

    wire: Wire
    clock: Clock
    stalled_bytes: int = 0
    stalled_s: float = 0.0

    def send(self, kind: FrameKind, payload: bytes) -> None:
        """Send now what fits, and keep the rest. Raises: PeerLost, CommTimeout when too much is kept"""
        self.wire.send(kind, 0, payload)
        if self.wire.unsent_bytes > MAX_UNSENT_BYTES:
            raise CommTimeout(f"{self.wire.peer} is behind by {self.wire.unsent_bytes} bytes about KV")
        self._note()

    def flush(self) -> None:
        """Send what was kept, as much as fits. Raises: PeerLost, CommTimeout when nothing did for too long"""
        if self.wire.unsent_bytes:
            self.wire.flush()
            self._note()

    def _note(self) -> None:
        left = self.wire.unsent_bytes
        if left and left == self.stalled_bytes:
            if self.clock() >= self.stalled_s + STALL_TIMEOUT_S:
                raise CommTimeout(f"{self.wire.peer} reads nothing about KV for {STALL_TIMEOUT_S:g} s")
            return
        self.stalled_bytes, self.stalled_s = left, self.clock()
