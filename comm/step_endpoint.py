"""A rank's side of the step bus: blocks for the next step, and answers it.

Holds no queue: what a rank has not asked for stays in the socket, and the driver is stopped by its own bound. Steps
have to come without gaps, and are answered in the order in which they came; a rank may take the next before it has
answered the last, as pipeline stages do.
"""

from __future__ import annotations

import select
import threading
from contextlib import suppress

from .errors import BadFrame, CommError, CommMisuse, CommTimeout, GroupClosed, HandshakeRefused, PeerLost, StepGap
from .frames import Frame, FrameKind, text_payload
from .handshake import MAX_MESSAGE_BYTES, Identity, RankHandshake
from .sockets import connect
from .wire import BusLimits, Clock, Deadline, Wire


def connect_rank(
    address: str,
    identity: Identity,
    *,
    rank: int,
    timeout_s: float,
    clock: Clock,
    limits: BusLimits | None = None,
) -> StepEndpoint:
    """Join the bus whose driver listens at an address, as one of its ranks.

    Raises: HandshakeRefused saying what does not fit; PeerLost, CommTimeout
    """
    limits = limits or BusLimits()
    if rank < 1:
        raise CommMisuse(f"rank {rank} connects to no driver: ranks other than the driver's count from 1")
    deadline = Deadline(timeout_s, clock)
    sock = connect(address, timeout_s=timeout_s)
    wire = Wire(sock, peer="the driver", max_payload_bytes=MAX_MESSAGE_BYTES)
    try:
        poll = select.poll()
        poll.register(wire.fileno(), select.POLLIN)
        handshake = RankHandshake(identity, rank=rank)
        challenge = _handshake_frame(wire, poll, deadline, FrameKind.CHALLENGE)
        wire.send(FrameKind.HELLO, 0, handshake.hello(challenge))
        handshake.check(_handshake_frame(wire, poll, deadline, FrameKind.WELCOME))
        wire.allow(limits.max_payload_bytes)
    except CommError as error:
        wire.close()
        raise type(error)(f"step bus {identity.replica!r}, rank {rank}: {error}") from error
    return StepEndpoint(wire, poll, rank=rank, replica=identity.replica, limits=limits, clock=clock)


class StepEndpoint:
    """One rank of a step bus. It has to be closed, also after an error."""

    def __init__(
        self, wire: Wire, poll: select.poll, *, rank: int, replica: str, limits: BusLimits, clock: Clock
    ) -> None:
        """Take a connection that has been through the handshake; ``poll`` waits for its bytes."""
        self.rank = rank
        self._name = f"step bus {replica!r}, rank {rank}"
        self._wire = wire
        self._limits = limits
        self._clock = clock
        self._received = 0
        self._answered = 0
        self._failure: CommError | None = None
        self._closed = False
        # Taken in this order. Nobody waits while holding the last.
        self._receiving = threading.Lock()
        self._sending = threading.RLock()
        self._state = threading.Lock()
        self._poll = poll

    def next_step(self, timeout_s: float) -> tuple[int, bytes]:
        """Wait for the next step and return its number and payload.

        Raises: CommTimeout when none came, it may be called again; GroupClosed when the driver ended the bus, and why;
        PeerLost, StepGap, BadFrame
        """
        deadline = Deadline(timeout_s, self._clock)
        if not self._receiving.acquire(timeout=max(timeout_s, 0.0)):
            raise CommTimeout(f"{self._name}: another thread waits for a step since {timeout_s:g} s")
        try:
            self._raise_failure()
            try:
                frame = _next_frame(self._wire, self._poll, deadline)
                if frame is None:
                    raise CommTimeout(f"{self._name}: no step came within {timeout_s:g} s")
                return self._take(frame)
            except CommTimeout:
                raise
            except CommError as error:
                raise self._fail(error) from error
        finally:
            self._receiving.release()

    def send_result(self, seq: int, payload: bytes) -> None:
        """Answer a step; waits only where the driver is slow to read.

        Raises: StepGap when it is not this step's turn; PeerLost, CommTimeout; CommMisuse for a payload over the limit
        """
        if len(payload) > self._limits.max_payload_bytes:
            limit = self._limits.max_payload_bytes
            raise CommMisuse(f"{self._name}: a result of {len(payload)} bytes is over the limit of {limit}")
        self._answer(FrameKind.RESULT, seq, payload)

    def send_failure(self, seq: int, text: str) -> None:
        """Answer a step with why it could not be carried out; long texts are cut.

        Raises: as ``send_result``
        """
        self._answer(FrameKind.FAILURE, seq, text_payload(text))

    def close(self, reason: str = "the rank closed its end") -> None:
        """Tell the driver, end the connection and let a waiting thread have GroupClosed. Idempotent."""
        self._fail(GroupClosed(reason))
        # The connection has ended: whoever polls it is awake and lets go of the lock.
        with self._receiving, self._sending:
            if not self._closed:
                self._closed = True
                self._wire.close()

    def _take(self, frame: Frame) -> tuple[int, bytes]:
        if frame.kind is FrameKind.CLOSE:
            raise GroupClosed(f"the driver ended the bus: {frame.text}")
        if frame.kind is not FrameKind.STEP:
            raise BadFrame(f"the driver sent a frame of kind {frame.kind.name}")
        due = self._received + 1
        if frame.seq != due:
            what = "repeated" if frame.seq < due else "missed"
            raise StepGap(f"step {frame.seq} came, due was {due}: a step was {what}")
        self._received = due
        return due, frame.payload

    def _answer(self, kind: FrameKind, seq: int, payload: bytes) -> None:
        with self._sending:
            self._raise_failure()
            due = self._answered + 1
            if seq != due or seq > self._received:
                raise StepGap(
                    f"{self._name}: step {seq} cannot be answered: due is {due}, the last that came {self._received}"
                )
            self._answered = due
            try:
                self._wire.send(kind, seq, payload)
                self._drain()
            except CommError as error:
                raise self._fail(error) from error

    def _drain(self) -> None:
        if not self._wire.unsent_bytes:
            return
        poll = select.poll()
        poll.register(self._wire.fileno(), select.POLLOUT)
        while self._wire.unsent_bytes:
            if not poll.poll(self._limits.stall_timeout_s * 1e3):
                raise CommTimeout(f"the driver reads nothing for {self._limits.stall_timeout_s:g} s")
            self._wire.flush()

    def _fail(self, error: CommError) -> CommError:
        """End the connection with an error, the first one counts; return it, to be raised."""
        with self._state:
            first = self._failure is None
            failure = self._failure = self._failure or type(error)(f"{self._name}: {error}")
        # Without the lock somebody is in the middle of a frame, and nothing else makes sense to the driver.
        if first and self._sending.acquire(blocking=False):
            try:
                if not self._wire.unsent_bytes:
                    # The driver may be what was lost.
                    with suppress(PeerLost):
                        self._wire.send(FrameKind.CLOSE, 0, text_payload(str(error)))
            finally:
                self._sending.release()
        self._wire.end()
        return type(failure)(str(failure))

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))


def _next_frame(wire: Wire, poll: select.poll, deadline: Deadline) -> Frame | None:
    """Return the next frame; None at the deadline."""
    while (frame := wire.take()) is None:
        if not poll.poll(deadline.remaining_ms) and not deadline.remaining_s:
            return None
        wire.receive()
    return frame


def _handshake_frame(wire: Wire, poll: select.poll, deadline: Deadline, kind: FrameKind) -> bytes:
    frame = _next_frame(wire, poll, deadline)
    if frame is None:
        raise CommTimeout(f"the driver did not answer the handshake within {deadline.timeout_s:g} s")
    if frame.kind is FrameKind.REFUSAL:
        raise HandshakeRefused(f"the driver refused: {frame.text}")
    if frame.kind is not kind:
        raise BadFrame(f"the driver sent a frame of kind {frame.kind.name}, due was {kind.name}")
    return frame.payload
