"""Where the ranks of a replica come together: listens at an address until each has connected and proved itself.

Anybody may connect to an address. A stranger who says nothing holds nobody up, and at most ``MAX_STRANGERS`` are kept
waiting, the longest of them goes first; one who cannot prove itself is told so and put out, and the error at the
deadline names the last few. A rank that ends before all are there may come again.
"""

from __future__ import annotations

import select
import socket
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from .errors import BadFrame, CommError, CommMisuse, CommTimeout, HandshakeRefused, PeerLost
from .frames import FrameKind, text_payload
from .handshake import MAX_MESSAGE_BYTES, DriverHandshake, Identity
from .sockets import listen, remove
from .step_bus import StepHub
from .wire import BusLimits, Clock, Deadline, Wire

MAX_STRANGERS = 64
_REFUSALS_KEPT = 4
_MEANWHILE_PERIOD_MS = 200


class StepListener:
    """A driver's address. A hub keeps its connections when the listener is closed."""

    def __init__(self, address: str) -> None:
        """Listen at ``unix:/path`` or ``host:port``; port 0 is any free one.

        Raises: CommMisuse
        """
        self._socket, self.address = listen(address)

    def gather(
        self,
        identity: Identity,
        *,
        ranks: Iterable[int],
        timeout_s: float,
        clock: Clock,
        limits: BusLimits | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> StepHub:
        """Wait until every rank has connected, and return the hub that joins them.

        ``meanwhile`` is called several times a second, and ends the wait by raising something.

        Raises: CommTimeout naming the ranks that are missing, and who was refused
        """
        gathering = _Gathering(self._socket, identity, frozenset(ranks), limits or BusLimits())
        reason = "the driver needs no more connections"
        try:
            return gathering.run(Deadline(timeout_s, clock), clock, meanwhile)
        except Exception as error:
            reason = str(error)
            raise
        finally:
            gathering.end(reason)

    def close(self) -> None:
        """Stop listening. Idempotent."""
        if self._socket.fileno() >= 0:
            self._socket.close()
            remove(self.address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


@dataclass(slots=True)
class _Guest:
    """Who has connected: a stranger until ``rank`` is set."""

    wire: Wire
    handshake: DriverHandshake
    rank: int | None = None


class _Gathering:
    """One wait for all ranks."""

    def __init__(self, sock: socket.socket, identity: Identity, ranks: frozenset[int], limits: BusLimits) -> None:
        if any(rank < 1 for rank in ranks):
            raise CommMisuse(f"ranks other than the driver's count from 1, got {sorted(ranks)}")
        self._socket = sock
        self._identity = identity
        self._missing = set(ranks)
        self._limits = limits
        self._guests: dict[int, _Guest] = {}
        self._refusals: deque[str] = deque(maxlen=_REFUSALS_KEPT)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def run(self, deadline: Deadline, clock: Clock, meanwhile: Callable[[], None] | None) -> StepHub:
        """Let guests in until nobody is missing."""
        while self._missing:
            wait_ms = deadline.remaining_ms
            if meanwhile is not None:
                meanwhile()
                wait_ms = min(wait_ms, _MEANWHILE_PERIOD_MS)
            ready = self._poll.poll(wait_ms)
            if not ready and not deadline.remaining_s:
                raise self._too_late(deadline.timeout_s)
            for descriptor, _ in ready:
                if descriptor == self._socket.fileno():
                    self._admit()
                elif descriptor in self._guests:
                    self._hear(self._guests[descriptor])
        joined = {guest.rank: guest.wire for guest in self._guests.values() if guest.rank is not None}
        # What stays in the list is put out by ``end``.
        self._guests = {key: guest for key, guest in self._guests.items() if guest.rank is None}
        wires = {rank: joined[rank] for rank in sorted(joined)}
        return StepHub(wires, name=f"step bus {self._identity.replica!r}", limits=self._limits, clock=clock)

    def end(self, reason: str) -> None:
        """Put out whoever is no rank of a hub."""
        for guest in list(self._guests.values()):
            self._put_out(guest, reason)

    def _admit(self) -> None:
        try:
            sock, _ = self._socket.accept()
        except OSError:
            # Gone again before its turn came.
            return
        wire = Wire(sock, peer="a stranger", max_payload_bytes=MAX_MESSAGE_BYTES)
        guest = _Guest(wire, DriverHandshake(self._identity))
        strangers = [each for each in self._guests.values() if each.rank is None]
        if len(strangers) >= MAX_STRANGERS:
            self._put_out(strangers[0], "too many connections that say nothing")
        self._guests[wire.fileno()] = guest
        self._poll.register(wire.fileno(), select.POLLIN)
        try:
            wire.send(FrameKind.CHALLENGE, 0, guest.handshake.challenge())
        except PeerLost:
            self._put_out(guest, "")

    def _hear(self, guest: _Guest) -> None:
        try:
            guest.wire.receive()
            while (frame := guest.wire.take()) is not None:
                if frame.kind is not FrameKind.HELLO or guest.rank is not None:
                    raise BadFrame(f"{guest.wire.peer} sent a frame of kind {frame.kind.name} before the bus was there")
                self._join(guest, frame.payload)
        except PeerLost:
            self._put_out(guest, "")
        except CommError as error:
            self._put_out(guest, str(error))

    def _join(self, guest: _Guest, hello: bytes) -> None:
        rank, welcome = guest.handshake.check(hello)
        if rank not in self._missing:
            joined = any(each.rank == rank for each in self._guests.values())
            raise HandshakeRefused(f"rank {rank} {'has joined already' if joined else 'is none of this replica'}")
        guest.wire.send(FrameKind.WELCOME, 0, welcome)
        guest.wire.allow(self._limits.max_payload_bytes)
        guest.wire.peer = f"rank {rank}"
        guest.rank = rank
        self._missing.discard(rank)

    def _put_out(self, guest: _Guest, reason: str) -> None:
        if guest.rank is not None:
            self._missing.add(guest.rank)
        if reason:
            self._refusals.append(reason)
            kind = FrameKind.REFUSAL if guest.rank is None else FrameKind.CLOSE
            with suppress(PeerLost):
                guest.wire.send(kind, 0, text_payload(reason))
        self._poll.unregister(guest.wire.fileno())
        del self._guests[guest.wire.fileno()]
        guest.wire.close()

    def _too_late(self, timeout_s: float) -> CommTimeout:
        missing = ", ".join(str(rank) for rank in sorted(self._missing))
        refused = f"; refused: {'; '.join(self._refusals)}" if self._refusals else ""
        return CommTimeout(
            f"step bus {self._identity.replica!r}: rank {missing} did not connect within {timeout_s:g} s{refused}"
        )
