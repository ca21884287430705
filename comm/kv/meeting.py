"""The first words on a KV connection: both prove the cluster's secret, then say what KV they hold.

    listener → sender   challenge
    sender → listener   hello                 (``comm/handshake``)
    listener → sender   welcome
    sender → listener   offer
    listener → sender   offer, or a refusal that names what does not fit

After that the connection belongs to a channel. All of it has one deadline, and nothing is larger than a page.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import NoReturn

from ..errors import BadFrame, CommError, CommTimeout, HandshakeRefused, KvMismatch, PeerLost
from ..frames import HEADER, Frame, FrameKind, FrameReader, text_payload
from ..handshake import MAX_MESSAGE_BYTES, DriverHandshake, Identity, RankHandshake
from ..sockets import prepare
from ..wire import Deadline
from .layout import KvOffer, check_fit
from .transfer import Peer, PeerRank


@dataclass(frozen=True, slots=True)
class Met:
    """Who is at the other end."""

    peer: PeerRank
    offer: KvOffer


def kv_identity(replica: str, secret: bytes) -> Identity:
    """Return what both ends of a KV connection to a replica prove; no other connection of the cluster takes it."""
    return Identity(replica=f"kv/{replica}", secret=secret)


def meet_sender(sock: socket.socket, offer: KvOffer, secret: bytes, deadline: Deadline) -> Met:
    """Be the listener's side of a new connection.

    Raises: HandshakeRefused, KvMismatch, BadFrame; PeerLost, CommTimeout
    """
    talk = _Talk(sock, deadline)
    handshake = DriverHandshake(kv_identity(offer.replica, secret))
    try:
        talk.say(FrameKind.CHALLENGE, handshake.challenge())
        rank, welcome = handshake.check(talk.hear(FrameKind.HELLO))
        talk.say(FrameKind.WELCOME, welcome)
        theirs = KvOffer.decode(talk.hear(FrameKind.OFFER))
        check_fit(offer, theirs)
        if rank != theirs.rank:
            raise BadFrame(f"rank {rank} of {theirs.replica!r} offers the KV of rank {theirs.rank}")
    except (PeerLost, CommTimeout):
        raise
    except CommError as error:
        talk.refuse(error)
    talk.say(FrameKind.OFFER, offer.encode())
    return _met(theirs)


def meet_receiver(sock: socket.socket, offer: KvOffer, to: str, secret: bytes, deadline: Deadline) -> Met:
    """Be the sender's side of a connection to replica ``to``.

    Raises: HandshakeRefused, KvMismatch, BadFrame; PeerLost, CommTimeout
    """
    talk = _Talk(sock, deadline)
    handshake = RankHandshake(kv_identity(to, secret), rank=offer.rank)
    talk.say(FrameKind.HELLO, handshake.hello(talk.hear(FrameKind.CHALLENGE)))
    handshake.check(talk.hear(FrameKind.WELCOME))
    talk.say(FrameKind.OFFER, offer.encode())
    theirs = KvOffer.decode(talk.hear(FrameKind.OFFER))
    check_fit(offer, theirs)
    if theirs.replica != to:
        raise HandshakeRefused(f"{theirs.replica!r} answers where {to!r} was expected")
    return _met(theirs)


class _Talk:
    """Frames on a socket, one after the other."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        prepare(sock)
        self._sock = sock
        self._deadline = deadline
        self._reader = FrameReader(max_payload_bytes=MAX_MESSAGE_BYTES)

    def say(self, kind: FrameKind, payload: bytes) -> None:
        self._within()
        try:
            self._sock.sendall(HEADER.pack(len(payload), kind, 0) + payload)
        except TimeoutError as error:
            raise CommTimeout("the other end of a KV connection does not read") from error
        except OSError as error:
            raise PeerLost(f"a new KV connection broke: {error}") from error

    def hear(self, kind: FrameKind) -> bytes:
        """Return the next frame's payload; a refusal is raised as what it is."""
        frame = self._next()
        if frame.kind is FrameKind.REFUSAL:
            name, _, text = frame.text.partition(": ")
            raise _REFUSALS.get(name, HandshakeRefused)(text)
        if frame.kind is not kind:
            raise BadFrame(f"a frame of kind {frame.kind.name} came where {kind.name} was due")
        return frame.payload

    def refuse(self, error: CommError) -> NoReturn:
        """Tell the other end why not."""
        self.say(FrameKind.REFUSAL, text_payload(f"{type(error).__name__}: {error}"))
        raise error

    def _next(self) -> Frame:
        while (frame := self._reader.take()) is None:
            self._within()
            try:
                count = self._sock.recv_into(self._reader.space())
            except TimeoutError as error:
                raise CommTimeout("the other end of a new KV connection says nothing") from error
            except OSError as error:
                raise PeerLost(f"a new KV connection broke: {error}") from error
            if count == 0:
                raise PeerLost("a new KV connection ended before its two ends had met")
            self._reader.advance(count)
        return frame

    def _within(self) -> None:
        # A time-out of 0 would mean not to wait at all, and to say so with an error of another kind.
        self._sock.settimeout(max(self._deadline.remaining_s, 0.001))


_REFUSALS = {error.__name__: error for error in (HandshakeRefused, KvMismatch, BadFrame)}


def _met(offer: KvOffer) -> Met:
    return Met(PeerRank(Peer(offer.replica, offer.incarnation), offer.rank), offer)
