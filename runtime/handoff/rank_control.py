"""A rank's end of its KV control connection: hears the driver's orders, and says what became of them.

One thread does both. When the driver is gone it ends; the rank's life is the step bus's business.
"""

from __future__ import annotations

import logging
import select
import threading
from collections import deque

from ...comm.errors import BadFrame, CommError, CommTimeout, GroupClosed, HandshakeRefused
from ...comm.frames import Frame, FrameKind
from ...comm.handshake import MAX_MESSAGE_BYTES, Identity, RankHandshake
from ...comm.sockets import connect
from ...comm.wire import Clock, Deadline, Wire
from .control import LOOK_MS, Bell, ControlWire, control_identity
from .rank_kv import RankKv
from .rank_orders import MAX_ORDER_BYTES, RankWord, decode_order, encode_ends, encode_word

logger = logging.getLogger(__name__)


class RankControl:
    """Joins a rank's KV to its driver. It has to be closed, and the KV after it."""

    def __init__(self, address: str, identity: Identity, kv: RankKv, *, timeout_s: float, clock: Clock) -> None:
        """Connect to the driver and say where this rank takes KV in.

        Raises: HandshakeRefused saying what does not fit; PeerLost, CommTimeout, BadFrame
        """
        self._kv = kv
        self._wire = _meet(address, identity, kv.rank, Deadline(timeout_s, clock))
        self._line = ControlWire(self._wire, clock)
        self._line.send(FrameKind.OFFER, encode_ends(kv.ends))
        self._bell = Bell()
        # Bounded by the driver's orders, and by connections to this rank, which are.
        self._words: deque[RankWord] = deque()
        self._over = False
        kv.listen(self._hear_rank, on_failed=self._end)
        self._thread = threading.Thread(target=self._run, name=f"slipstream-kv-control-{kv.rank}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the connection. Idempotent."""
        self._end()
        self._thread.join()
        self._wire.close()
        self._bell.close()

    def _hear_rank(self, word: RankWord) -> None:
        self._words.append(word)
        self._bell.ring()

    def _end(self) -> None:
        self._over = True
        self._bell.ring()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._bell.fileno(), select.POLLIN)
        try:
            while not self._over:
                unsent = self._wire.unsent_bytes > 0
                poll.register(self._wire.fileno(), select.POLLIN | (select.POLLOUT if unsent else 0))
                ready = dict(poll.poll(LOOK_MS if unsent else None))
                if self._bell.fileno() in ready:
                    self._bell.hear()
                self._line.flush()
                while self._words:
                    self._line.send(FrameKind.REPORT, encode_word(self._words.popleft()))
                if ready.get(self._wire.fileno(), 0) & ~select.POLLOUT:
                    self._wire.receive()
                    while (frame := self._wire.take()) is not None:
                        self._take(frame)
        except CommError as error:
            logger.info("orders about KV have ended at rank %d: %s", self._kv.rank, error)
        finally:
            # A rank whose KV can move no more is lost to its driver at once.
            self._wire.end()

    def _take(self, frame: Frame) -> None:
        if frame.kind is FrameKind.CLOSE:
            raise GroupClosed(frame.text)
        if frame.kind is not FrameKind.ORDER:
            raise BadFrame(f"the driver sent a frame of kind {frame.kind.name} about KV")
        self._kv.order(decode_order(frame.payload))


def _meet(address: str, identity: Identity, rank: int, deadline: Deadline) -> Wire:
    """Connect, and prove the replica's secret both ways."""
    wire = Wire(
        connect(address, timeout_s=deadline.remaining_s), peer="the driver", max_payload_bytes=MAX_MESSAGE_BYTES
    )
    try:
        poll = select.poll()
        poll.register(wire.fileno(), select.POLLIN)
        handshake = RankHandshake(control_identity(identity), rank=rank)
        wire.send(FrameKind.HELLO, 0, handshake.hello(_heard(wire, poll, deadline, FrameKind.CHALLENGE)))
        handshake.check(_heard(wire, poll, deadline, FrameKind.WELCOME))
        wire.allow(MAX_ORDER_BYTES)
    except CommError:
        wire.close()
        raise
    return wire


def _heard(wire: Wire, poll: select.poll, deadline: Deadline, kind: FrameKind) -> bytes:
    while (frame := wire.take()) is None:
        if not poll.poll(deadline.remaining_ms) and not deadline.remaining_s:
            raise CommTimeout(f"the driver did not answer about KV within {deadline.timeout_s:g} s")
        wire.receive()
    if frame.kind is FrameKind.REFUSAL:
        raise HandshakeRefused(f"the driver refused: {frame.text}")
    if frame.kind is not kind:
        raise BadFrame(f"the driver sent a frame of kind {frame.kind.name}, due was {kind.name}")
    return frame.payload
