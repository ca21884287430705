"""Where KV comes in: listens, meets whoever connects, and stores the frames of those who may, a thread a connection.

A stranger who says nothing holds nobody up: his time is short, and the longest waiting goes when there are too many. A
rank that comes with a later incarnation puts an end to the connections of its earlier one; one that comes with an
earlier is refused.
"""

from __future__ import annotations

import select
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass

from ..errors import CommError, HandshakeRefused
from ..sockets import listen, remove
from ..wire import Deadline
from .channel import Carrier, ChannelIn, StreamLimits
from .checksum import FrameChecksum
from .frame import HEADER_BYTES, KvHeader, unpack_header
from .incoming import Drop, Outcome
from .layout import KvOffer
from .meeting import Met, meet_sender
from .memory import KvStore, Passage
from .transfer import PeerRank
from .transport import Clock, Events, Gate, PeerDown, Written

_BREATH_MS = 10


@dataclass(slots=True, eq=False)
class _Guest:
    """A connection: a stranger's until ``peer`` is set. ``spoke``: whether a frame has begun to come over it."""

    sock: socket.socket
    thread: threading.Thread | None = None
    peer: PeerRank | None = None
    spoke: bool = False
    channel: ChannelIn | None = None

    def end(self) -> None:
        """End the connection, from any thread."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)


class Inlet:
    """A listening address and all connections to it."""

    def __init__(
        self,
        address: str,
        carrier: Carrier,
        offer: KvOffer,
        gate: Gate,
        *,
        secret: bytes,
        limits: StreamLimits,
        clock: Clock,
        events: Events,
    ) -> None:
        """Listen. Raises: CommMisuse"""
        self._socket, self.address = listen(address)
        self._carrier = carrier
        self._offer = offer
        self._gate = gate
        self._secret = secret
        self._limits = limits
        self._clock = clock
        self._events = events
        self._memory: KvStore | None = None
        self._lock = threading.Lock()
        self._guests: list[_Guest] = []
        self._over = False
        self._wake, self._woken = socket.socketpair()
        self._accepting: threading.Thread | None = None

    def open(self, memory: KvStore) -> None:
        """Let connections in, whose frames go to this memory."""
        self._memory = memory
        self._accepting = threading.Thread(target=self._accept, name="slipstream-kv-accept", daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """End all connections and wait until nothing is written any more; bounded, because every wait is."""
        with self._lock:
            self._over = True
        self._wake.send(b"x")
        if self._accepting is not None:
            self._accepting.join()
        with self._lock:
            guests = list(self._guests)
        for guest in guests:
            guest.end()
        for guest in guests:
            if guest.thread is not None:
                guest.thread.join()
        for sock in (self._socket, self._wake, self._woken):
            sock.close()
        remove(self.address)

    # -------------------------------------------------------------- letting in

    def _accept(self) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        woken = select.poll()
        woken.register(self._woken, select.POLLIN)
        while True:
            poll.poll()
            if self._over:
                return
            try:
                sock, _ = self._socket.accept()
            except OSError:
                # Gone again before its turn came. Or there is no descriptor for it: it is still there in a moment.
                woken.poll(_BREATH_MS)
                continue
            guest = _Guest(sock)
            guest.thread = threading.Thread(target=self._host, args=(guest,), name="slipstream-kv-from", daemon=True)
            if self._make_room(guest):
                guest.thread.start()
            else:
                sock.close()

    def _make_room(self, guest: _Guest) -> bool:
        with self._lock:
            if self._over or len(self._guests) >= self._limits.max_connections:
                return False
            strangers = [each for each in self._guests if each.peer is None]
            if len(strangers) >= self._limits.max_strangers:
                strangers[0].end()
            self._guests.append(guest)
            return True

    def _host(self, guest: _Guest) -> None:
        """Be one connection's thread."""
        why = "this end failed"
        try:
            deadline = Deadline(self._limits.meeting_timeout_s, self._clock)
            met = meet_sender(guest.sock, self._offer, self._secret, deadline)
            self._welcome(guest, met)
            self._receive(guest, met.peer)
        except CommError as error:
            why = str(error)
        finally:
            self._see_off(guest, why)

    def _welcome(self, guest: _Guest, met: Met) -> None:
        peer = met.peer
        with self._lock:
            for other in self._guests:
                if other.peer is None or other.peer.peer.replica != peer.peer.replica or other.peer.rank != peer.rank:
                    continue
                if other.peer.peer.incarnation > peer.peer.incarnation:
                    raise HandshakeRefused(f"{peer} comes from an earlier life than {other.peer}")
                if other.peer.peer.incarnation < peer.peer.incarnation:
                    other.end()
            guest.peer = peer
        name = f"rank {peer.rank} of {peer.peer.replica!r}"
        guest.channel = self._carrier.channel_from(guest.sock, peer=name, limits=self._limits, clock=self._clock)

    def _see_off(self, guest: _Guest, why: str) -> None:
        """Forget a connection; where it was a peer's, end its others too: nobody knows what was lost."""
        with self._lock:
            self._guests.remove(guest)
            if guest.channel is not None:
                guest.channel.close()
            guest.sock.close()
            others = [each for each in self._guests if each.peer is not None and each.peer == guest.peer]
            # One that only came to see whether it is connected already leaves the others as they are; if there was
            # more to it, its other end sees that it broke, and ends the others.
            for other in others if guest.spoke else ():
                other.end()
            last = guest.peer is not None and not others and not self._over
        if last and guest.peer is not None:
            self._events.add(PeerDown(guest.peer, why))

    # -------------------------------------------------------------- storing

    def _receive(self, guest: _Guest, peer: PeerRank) -> None:
        channel, memory = guest.channel, self._memory
        assert channel is not None and memory is not None
        checksums = self._offer.checksum != "none"
        head = bytearray(HEADER_BYTES)
        while True:
            channel.receive_header(head)
            guest.spoke = True
            header = unpack_header(head, peer.peer.replica, max_payload_bytes=self._limits.max_frame_bytes)
            answer = self._gate.admit(header, peer)
            if isinstance(answer, Drop):
                channel.skip(header.payload_bytes)
                continue
            # Whatever happens, the gate hears of the end of a write: blocks are kept until then.
            outcome = Outcome.LOST
            try:
                frame = answer.frame
                passage = memory.inward(frame.layer, frame.heads, answer.cuts, answer.blocks)
                outcome = _store(channel, header, passage, checksums=checksums)
            finally:
                self._gate.finish(answer, outcome)
                self._events.add(Written(answer.frame, outcome))


def _store(channel: ChannelIn, header: KvHeader, passage: Passage, *, checksums: bool) -> Outcome:
    """Take a frame's bytes in, and check them where they are now."""
    checksum = FrameChecksum(header.frame) if checksums else None
    try:
        channel.receive(passage.runs, None if checksum is None else checksum.add)
        if checksum is not None and checksum.value != header.checksum:
            return Outcome.BAD_CHECKSUM
        passage.store()
        return Outcome.APPLIED
    finally:
        passage.end()
