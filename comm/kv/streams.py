"""A transport made of connections: lines out, an inlet in. Which kind of connections is the carrier's business.

One for a rank. Whoever wants to send connects first, and is told who answers; frames then go by that name.
"""

from __future__ import annotations

import threading

from ..errors import CommError, CommMisuse, GroupClosed, HandshakeRefused
from ..sockets import connect
from ..wire import Deadline
from .channel import Carrier, ChannelOut, StreamLimits
from .inlet import Inlet
from .layout import KvOffer
from .line import Budget, Line
from .meeting import Met, meet_receiver
from .memory import KvStore
from .outgoing import Post
from .transfer import PeerRank, TransferId
from .transport import Clock, Event, Events, Gate, Released, need


class StreamTransport:
    """A ``KvTransport`` over sockets. It has to be closed.

    Raises: CommMisuse when nobody can listen at the address
    """

    def __init__(
        self,
        carrier: Carrier,
        offer: KvOffer,
        gate: Gate,
        *,
        address: str,
        secret: bytes,
        clock: Clock,
        limits: StreamLimits | None = None,
        across_hosts: bool = False,
        events: Events | None = None,
    ) -> None:
        """Listen at an address of this host, port 0 for any; ``across_hosts``: peers may be on others.

        ``events``: where what happens goes; None is one of its own.
        """
        carrier.check_address(address, across_hosts=across_hosts)
        self._carrier = carrier
        self._offer = offer
        self._secret = secret
        self._clock = clock
        self._limits = limits or StreamLimits()
        self._events = events or Events()
        self._budget = Budget(self._limits.max_queued_bytes)
        self._memory: KvStore | None = None
        self._lines: dict[tuple[str, int], Line] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._inlet = Inlet(
            address,
            carrier,
            offer,
            gate,
            secret=secret,
            limits=self._limits,
            clock=clock,
            events=self._events,
        )
        self.address = self._inlet.address
        """Where others connect to, with the port that 0 became."""

    def register(self, memory: KvStore) -> None:
        """Use this memory, once, and let connections in."""
        if self._memory is not None:
            raise CommMisuse("this KV transport has its memory already; one is registered, once")
        shape, layout, rank = memory.shape, self._offer.layout, self._offer.rank
        facts = [
            ("layers", shape.layers, layout.layers_of(rank)),
            ("heads", shape.heads, layout.heads_of(rank)),
            ("block_size", shape.block_size, layout.block_size),
        ]
        for name, registered, offered in facts:
            if registered != offered:
                raise CommMisuse(f"memory with {name} {registered} was registered where {offered} is offered to others")
        self._carrier.register(memory)
        self._memory = memory
        self._inlet.open(memory)

    def connect(self, address: str, to: str, *, timeout_s: float) -> PeerRank:
        """Connect to the rank of replica ``to`` that listens at an address, unless it is connected; say who it is.

        Raises: HandshakeRefused, KvMismatch, PeerLost, CommTimeout, BadFrame, CommMisuse
        """
        memory = need(self._memory)
        deadline = Deadline(timeout_s, self._clock)
        channels: list[ChannelOut] = []
        try:
            met, first = self._open(address, to, deadline)
            channels.append(first)
            key = (met.peer.peer.replica, met.peer.rank)
            with self._lock:
                line = self._lines.get(key)
            if line is not None and line.up and line.peer == met.peer:
                first.close()
                return met.peer
            while len(channels) < self._limits.streams:
                again, channel = self._open(address, to, deadline)
                channels.append(channel)
                if again != met:
                    raise HandshakeRefused(f"another rank answers at {address} than a moment ago")
        except CommError as error:
            for channel in channels:
                channel.close()
            raise type(error)(f"KV to {to!r} at {address}: {error}") from error
        checksums = self._offer.checksum != "none"
        line = Line(met.peer, channels, memory, checksums=checksums, budget=self._budget, events=self._events)
        with self._lock:
            closed = self._closed
            old = self._lines.get(key)
            if not closed:
                self._lines[key] = line
        if closed:
            line.close()
            raise GroupClosed(f"KV to {to!r} at {address}: this end was closed meanwhile")
        if old is not None:
            # Of an earlier life, or broken: nothing that was meant for it may reach this one.
            old.take_down("" if old.peer == met.peer else f"{to!r} has begun a new life")
            old.close()
        return met.peer

    def post(self, post: Post) -> bool:
        """Take a frame to send."""
        count = post.frame.payload_bytes(need(self._memory).shape.entry_bytes)
        if count > self._limits.max_frame_bytes:
            limit = self._limits.max_frame_bytes
            raise CommMisuse(
                f"a KV frame of {count} bytes is over the limit of {limit}: cut its tokens into more frames"
            )
        if not self._budget.take(count):
            return False
        with self._lock:
            line = self._lines.get((post.to.peer.replica, post.to.rank))
        if line is None or line.peer != post.to or not line.put(post):
            self._budget.give(count)
            self._events.add(Released(post.frame, sent=False))
        return True

    def poll(self, timeout_s: float) -> list[Event]:
        """Return what happened."""
        return self._events.take(timeout_s)

    def cancel(self, transfer: TransferId) -> None:
        """Drop what was posted of a transfer and is not going out yet."""
        with self._lock:
            lines = list(self._lines.values())
        for line in lines:
            line.cancel(transfer)

    def close(self) -> None:
        """End everything."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            lines = list(self._lines.values())
        for line in lines:
            line.take_down("")
        self._inlet.close()
        for line in lines:
            line.close()
        self._carrier.close()

    def _open(self, address: str, to: str, deadline: Deadline) -> tuple[Met, ChannelOut]:
        sock = connect(address, timeout_s=deadline.remaining_s)
        try:
            met = meet_receiver(sock, self._offer, to, self._secret, deadline)
            name = f"rank {met.peer.rank} of {to!r}"
            return met, self._carrier.channel_to(sock, peer=name, limits=self._limits, clock=self._clock)
        except BaseException:
            sock.close()
            raise
