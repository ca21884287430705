"""The driver's end of its ranks' KV control connections: lets the ranks in, orders them about, hears what they say.

One thread does all of it, from before the ranks are started; no caller waits for a socket. A rank that is lost once it
has joined is an error of the replica, which ``check`` raises.
"""

from __future__ import annotations

import select
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from ...comm.errors import BadFrame, CommError, HandshakeRefused, PeerLost
from ...comm.frames import Frame, FrameKind, text_payload
from ...comm.handshake import MAX_MESSAGE_BYTES, DriverHandshake, Identity
from ...comm.sockets import listen, remove
from ...comm.wire import Clock, Wire
from ...sdk.errors import EngineError
from .control import LOOK_MS, Bell, ControlWire, control_identity
from .rank_orders import MAX_ORDER_BYTES, KvOrder, RankEnd, RankWord, decode_ends, decode_word, encode_order

MAX_STRANGERS = 64
_MAX_ORDERS = 1 << 16

RankWordListener = Callable[[int, RankWord], None]


@dataclass(slots=True, eq=False)
class _Guest:
    """Who has connected: a stranger until ``rank`` is set; joined when its ends are known."""

    line: ControlWire
    handshake: DriverHandshake
    rank: int | None = None

    @property
    def wire(self) -> Wire:
        return self.line.wire


class KvHub:
    """Where ranks 1 and up of a replica come. It has to be closed.

    Raises: CommMisuse when nobody can listen at the address
    """

    def __init__(self, address: str, identity: Identity, *, ranks: Iterable[int], clock: Clock) -> None:
        """Listen at ``unix:/path`` or ``host:port``; port 0 is any free one."""
        self._socket, self.address = listen(address)
        self._identity = control_identity(identity)
        self._clock = clock
        self._expected = frozenset(ranks)
        self._guests: dict[int, _Guest] = {}
        self._ends: dict[int, tuple[RankEnd, ...]] = {}
        self._orders: deque[KvOrder] = deque()
        self._listener: RankWordListener = _nobody
        self._changed = threading.Condition()
        self._failure: str | None = None
        self._over = False
        self._closed = False
        self._bell = Bell()
        self._poll = select.poll()
        for descriptor in (self._socket.fileno(), self._bell.fileno()):
            self._poll.register(descriptor, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name="slipstream-kv-hub", daemon=True)
        self._thread.start()

    def wait_joined(self, timeout_s: float) -> dict[int, tuple[RankEnd, ...]]:
        """Wait until all ranks have come, and return where each takes KV in. Raises: EngineError naming who has not"""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or self._expected == self._ends.keys(), timeout_s)
        self.check()
        missing = self._expected - self._ends.keys()
        if missing:
            names = ", ".join(map(str, sorted(missing)))
            raise EngineError(f"rank {names} did not come to hear about KV within {timeout_s:g} s")
        return dict(self._ends)

    def listen(self, on_word: RankWordListener) -> None:
        """Tell somebody what ranks say, on this hub's thread; once, before the first order."""
        self._listener = on_word

    def give(self, order: KvOrder) -> None:
        """Send an order to all ranks, after those before; never waits."""
        if len(self._orders) >= _MAX_ORDERS:
            self._fail(f"{_MAX_ORDERS} orders about KV wait to be sent")
        if self._failure is None:
            self._orders.append(order)
            self._bell.ring()

    def check(self) -> None:
        """Look whether all ranks are there. Raises: EngineError naming the one that was lost"""
        if self._failure is not None:
            raise EngineError(self._failure)

    def close(self) -> None:
        """End all connections. Idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = self._over = True
        self._bell.ring()
        self._thread.join()
        for guest in self._guests.values():
            guest.wire.close()
        self._socket.close()
        self._bell.close()
        remove(self.address)

    # -------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            while not self._over and self._failure is None:
                self._turn()
        except Exception as error:
            # Whatever it was, nobody hears the ranks any more.
            self._fail(f"the ranks' KV cannot be ordered about any more: {error!r}")
            raise
        finally:
            for guest in self._guests.values():
                if self._over and not guest.wire.unsent_bytes:
                    with suppress(PeerLost):
                        guest.wire.send(FrameKind.CLOSE, 0, text_payload("the driver needs this rank's KV no more"))
                guest.wire.end()

    def _turn(self) -> None:
        unsent = [guest for guest in self._guests.values() if guest.wire.unsent_bytes]
        for guest in unsent:
            self._poll.modify(guest.wire.fileno(), select.POLLIN | select.POLLOUT)
        ready = self._poll.poll(LOOK_MS if unsent else None)
        for guest in unsent:
            self._poll.modify(guest.wire.fileno(), select.POLLIN)
            self._do(guest, guest.line.flush)
        for descriptor, what in ready:
            if descriptor == self._socket.fileno():
                self._admit()
            elif descriptor == self._bell.fileno():
                self._bell.hear()
            elif what & ~select.POLLOUT and (found := self._guests.get(descriptor)) is not None:
                self._do(found, lambda found=found: self._hear(found))  # type: ignore[misc]
        while self._orders and self._expected == self._ends.keys():
            self._send(self._orders.popleft())

    def _send(self, order: KvOrder) -> None:
        data = encode_order(order)
        for guest in [each for each in self._guests.values() if each.rank in self._ends]:
            self._do(guest, lambda guest=guest: guest.line.send(FrameKind.ORDER, data))  # type: ignore[misc]

    def _do(self, guest: _Guest, act: Callable[[], None]) -> None:
        """Do something with a connection, and put it out when that fails."""
        try:
            act()
        except CommError as error:
            self._put_out(guest, error)

    def _admit(self) -> None:
        try:
            sock, _ = self._socket.accept()
        except OSError:
            # Gone again before its turn came.
            return
        strangers = [each for each in self._guests.values() if each.rank is None]
        if len(strangers) >= MAX_STRANGERS:
            self._put_out(strangers[0], HandshakeRefused("too many connections that say nothing"))
        wire = Wire(sock, peer="a stranger", max_payload_bytes=MAX_MESSAGE_BYTES)
        guest = _Guest(ControlWire(wire, self._clock), DriverHandshake(self._identity))
        self._guests[wire.fileno()] = guest
        self._poll.register(wire.fileno(), select.POLLIN)
        self._do(guest, lambda: guest.line.send(FrameKind.CHALLENGE, guest.handshake.challenge()))

    def _hear(self, guest: _Guest) -> None:
        guest.wire.receive()
        while (frame := guest.wire.take()) is not None:
            if guest.rank is None:
                self._join(guest, frame)
            elif guest.rank not in self._ends:
                self._take_ends(guest.rank, frame)
            elif frame.kind is FrameKind.REPORT:
                self._listener(guest.rank, decode_word(frame.payload, rank=guest.rank))
            else:
                raise BadFrame(f"a frame of kind {frame.kind.name} came where a report was due")

    def _join(self, guest: _Guest, frame: Frame) -> None:
        if frame.kind is not FrameKind.HELLO:
            raise BadFrame(f"a frame of kind {frame.kind.name} came where a hello was due")
        rank, welcome = guest.handshake.check(frame.payload)
        if rank not in self._expected or any(other.rank == rank for other in self._guests.values()):
            raise HandshakeRefused(f"rank {rank} is none of those that are missing")
        guest.line.send(FrameKind.WELCOME, welcome)
        guest.wire.allow(MAX_ORDER_BYTES)
        guest.wire.peer = f"rank {rank}"
        guest.rank = rank

    def _take_ends(self, rank: int, frame: Frame) -> None:
        if frame.kind is not FrameKind.OFFER:
            raise BadFrame(f"a frame of kind {frame.kind.name} came where an offer was due")
        ends = decode_ends(frame.payload)
        with self._changed:
            self._ends[rank] = ends
            self._changed.notify_all()

    def _put_out(self, guest: _Guest, error: CommError) -> None:
        if guest.rank is not None:
            self._fail(f"the KV of rank {guest.rank} is out of reach: {error}")
            return
        with suppress(PeerLost):
            guest.wire.send(FrameKind.REFUSAL, 0, text_payload(str(error)))
        self._poll.unregister(guest.wire.fileno())
        del self._guests[guest.wire.fileno()]
        guest.wire.close()

    def _fail(self, why: str) -> None:
        with self._changed:
            self._failure = self._failure or why
            self._changed.notify_all()
        self._bell.ring()


def _nobody(rank: int, word: RankWord) -> None:
    """Hear a word before there is anybody to tell."""
