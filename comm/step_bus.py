"""The driver's side of the step bus: each step's plan goes out to the ranks of a replica, their answers come back.

A step is numbered when it is sent, and every rank answers every step, in order: with a result, which may be empty, or
with why it failed. Who skips or repeats a number is found out (``StepGap``); whose socket ends is lost at once, without
heartbeats; who says nothing runs into the deadline of the wait. Payloads are opaque bytes, the same for all ranks.

Threads: any may send, wait and close. Sending writes to each rank's socket and never waits. Where a socket is full, the
rest goes out on a thread of its own, which lives only that long: the driver may go on to a collective that the ranks
only join once they have the whole plan. Waiting reads the sockets itself; no other thread stands between.

    rank 0  StepHub ──┬── STEP 7 ──▶ StepEndpoint  rank 1
                      │ ◀─ RESULT 7 ──
                      └── ...                      rank 2

``step_listener`` makes a hub, ``step_endpoint`` is the other side. After an error that is final (``errors``) the ranks
are told why and every connection is ended, so that nobody waits for a replica that is broken.
"""

from __future__ import annotations

import select
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from .errors import (
    BadFrame,
    CommError,
    CommMisuse,
    CommTimeout,
    GroupClosed,
    PeerLost,
    RankFailed,
    StepGap,
    TooFarAhead,
)
from .frames import Frame, FrameKind, text_payload
from .wire import BusLimits, Clock, Deadline, Wire


@dataclass(slots=True)
class _Step:
    """A step on its way; it is forgotten when all ranks have answered and the driver has heard of it."""

    waiting: set[int]
    results: dict[int, bytes] = field(default_factory=dict)
    failure: tuple[int, str] | None = None
    collected: bool = False


class StepHub:
    """Rank 0 of a step bus. It has to be closed, also after an error."""

    def __init__(self, wires: Mapping[int, Wire], *, name: str, limits: BusLimits, clock: Clock) -> None:
        """Take the ranks' connections, which have been through the handshake; ``name`` begins every error."""
        self._wires = dict(wires)
        self._name = name
        self._limits = limits
        self._clock = clock
        self._answered = dict.fromkeys(self._wires, 0)
        self._steps: dict[int, _Step] = {}
        self._last_seq = 0
        self._failure: CommError | None = None
        self._closed = False
        # Taken in this order. Nobody waits while holding the second or third.
        self._receiving = threading.Lock()
        self._sending = threading.RLock()
        self._state = threading.Lock()
        self._flusher: threading.Thread | None = None
        self._rank_of = {wire.fileno(): rank for rank, wire in self._wires.items()}
        self._poll = select.poll()
        for descriptor in self._rank_of:
            self._poll.register(descriptor, select.POLLIN)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks at the other ends."""
        return tuple(self._wires)

    def send_step(self, payload: bytes) -> int:
        """Send the next step to every rank and return its number; never waits.

        Raises: TooFarAhead when nothing was sent; PeerLost; CommMisuse for a payload over the limit
        """
        if len(payload) > self._limits.max_payload_bytes:
            raise CommMisuse(
                f"{self._name}: a step of {len(payload)} bytes is over the limit of {self._limits.max_payload_bytes}"
            )
        with self._sending:
            seq = self._begin_step()
            for wire in self._wires.values():
                try:
                    wire.send(FrameKind.STEP, seq, payload)
                except PeerLost as error:
                    raise self._fail(error) from error
            if self._flusher is None and any(wire.unsent_bytes for wire in self._wires.values()):
                self._flusher = threading.Thread(target=self._flush, name="slipstream-step-bus", daemon=True)
                self._flusher.start()
        return seq

    def result(self, seq: int, timeout_s: float) -> dict[int, bytes]:
        """Return what each rank answered to a step, once all have; each step is collected once.

        Raises: RankFailed as soon as one rank says that it could not, the bus lives; CommTimeout naming the ranks that
        have not answered, who may still be waited for; PeerLost, GroupClosed, StepGap, BadFrame
        """
        deadline = Deadline(timeout_s, self._clock)
        if not self._receiving.acquire(timeout=max(timeout_s, 0.0)):
            raise CommTimeout(f"{self._name}: another thread waits for a step since {timeout_s:g} s")
        try:
            while True:
                results = self._collect(seq)
                if results is not None:
                    return results
                if not self._receive(deadline.remaining_ms) and not deadline.remaining_s:
                    raise self._too_late(seq, timeout_s)
        finally:
            self._receiving.release()

    def waits_for(self, seq: int) -> tuple[int, ...]:
        """Return the ranks that have not answered a step yet."""
        with self._state:
            step = self._steps.get(seq)
            return () if step is None else tuple(sorted(step.waiting))

    def check(self) -> None:
        """Take in what has arrived, without waiting: for a driver with nothing to do, whose ranks may have ended.

        Raises: PeerLost, GroupClosed, StepGap, BadFrame
        """
        # Whoever holds the lock is in ``result``, which sees the same.
        if self._receiving.acquire(blocking=False):
            try:
                self._receive(0)
            finally:
                self._receiving.release()
        with self._state:
            self._raise_failure()

    def close(self, reason: str = "the driver closed the bus") -> None:
        """Tell the ranks, end every connection and let waiting threads have GroupClosed. Idempotent."""
        self._fail(GroupClosed(reason))
        flusher = self._flusher
        if flusher is not None:
            flusher.join(self._limits.stall_timeout_s)
        # Every connection has ended: whoever polls one is awake and lets go of the lock.
        with self._receiving, self._sending:
            if not self._closed:
                self._closed = True
                for wire in self._wires.values():
                    wire.close()

    def _begin_step(self) -> int:
        with self._state:
            self._raise_failure()
            slow = min(self._answered, key=lambda rank: self._answered[rank], default=0)
            if len(self._steps) >= self._limits.max_ahead:
                raise TooFarAhead(
                    f"{self._name}: {len(self._steps)} steps are on their way, rank {slow} has answered "
                    f"{self._answered.get(slow, 0)} of {self._last_seq}: collect results before sending more"
                )
            for rank, wire in self._wires.items():
                if wire.unsent_bytes > self._limits.max_unsent_bytes:
                    raise TooFarAhead(f"{self._name}: {wire.unsent_bytes} bytes still wait for rank {rank} to read")
            self._last_seq += 1
            self._steps[self._last_seq] = _Step(waiting=set(self._wires))
            return self._last_seq

    def _collect(self, seq: int) -> dict[int, bytes] | None:
        """Return a step's results, or None while some are missing."""
        with self._state:
            step = self._steps.get(seq)
            if step is None or step.collected:
                self._raise_failure()
                raise CommMisuse(f"{self._name}: step {seq} is not on its way: it was collected, or never sent")
            if step.failure is None and step.waiting:
                self._raise_failure()
                return None
            step.collected = True
            if not step.waiting:
                del self._steps[seq]
            if step.failure is not None:
                rank, text = step.failure
                raise RankFailed(self._name, rank=rank, seq=seq, text=text)
            return step.results

    def _receive(self, wait_ms: int) -> bool:
        """Wait for anything from any rank and take it in; return False when nothing came.

        Does not raise, because an answer may have come right before its rank ended: a failure is kept.
        """
        if self._closed:
            return True
        ready = self._poll.poll(wait_ms)
        for descriptor, _ in ready:
            rank = self._rank_of[descriptor]
            wire = self._wires[rank]
            try:
                wire.receive()
                while (frame := wire.take()) is not None:
                    self._take(rank, frame)
            except CommError as error:
                self._fail(error)
        return bool(ready)

    def _take(self, rank: int, frame: Frame) -> None:
        if frame.kind is FrameKind.CLOSE:
            raise GroupClosed(f"rank {rank} closed its end: {frame.text}")
        if frame.kind not in (FrameKind.RESULT, FrameKind.FAILURE):
            raise BadFrame(f"rank {rank} sent a frame of kind {frame.kind.name}")
        with self._state:
            due = self._answered[rank] + 1
            if frame.seq != due or frame.seq > self._last_seq:
                raise StepGap(
                    f"rank {rank} answered step {frame.seq}, due was {due} of {self._last_seq}: "
                    f"it {'repeated' if frame.seq < due else 'missed'} a step"
                )
            self._answered[rank] = due
            step = self._steps[due]
            step.waiting.discard(rank)
            if frame.kind is FrameKind.RESULT:
                step.results[rank] = frame.payload
            elif step.failure is None:
                step.failure = (rank, frame.text)
            if step.collected and not step.waiting:
                del self._steps[due]

    def _too_late(self, seq: int, timeout_s: float) -> CommTimeout:
        missing = ", ".join(str(rank) for rank in self.waits_for(seq))
        return CommTimeout(f"{self._name}: step {seq}: no answer from rank {missing} within {timeout_s:g} s")

    def _flush(self) -> None:
        """Send what sockets had no room for, until nothing is left or a rank takes none of it for too long."""
        while True:
            with self._sending:
                late = {wire.fileno(): wire for wire in self._wires.values() if wire.unsent_bytes}
                if not late or self._failure is not None:
                    self._flusher = None
                    return
            poll = select.poll()
            for descriptor in late:
                poll.register(descriptor, select.POLLOUT)
            ready = poll.poll(self._limits.stall_timeout_s * 1e3)
            try:
                if not ready:
                    peers = ", ".join(wire.peer for wire in late.values())
                    raise CommTimeout(f"{peers}: reads nothing for {self._limits.stall_timeout_s:g} s")
                with self._sending:
                    for descriptor, _ in ready:
                        late[descriptor].flush()
            except CommError as error:
                # Whoever sends or waits next is told.
                self._fail(error)

    def _fail(self, error: CommError) -> CommError:
        """End the bus with an error, the first one counts; return it, to be raised."""
        with self._sending:
            with self._state:
                first = self._failure is None
                if first:
                    self._failure = _named(self._name, error)
                failure = self._failure
            assert failure is not None
            if first:
                for wire in self._wires.values():
                    self._say_goodbye(wire, str(error))
        return _named("", failure)

    def _say_goodbye(self, wire: Wire, reason: str) -> None:
        # After bytes of a step that are still to be sent nothing else makes sense to the rank.
        if not wire.unsent_bytes:
            # It may be gone, or be what was lost.
            with suppress(PeerLost):
                wire.send(FrameKind.CLOSE, 0, text_payload(reason))
        wire.end()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise _named("", self._failure)


def _named(name: str, error: CommError) -> CommError:
    """Return a new error of the same kind, so that no two threads raise the same one."""
    return type(error)(f"{name}: {error}" if name else str(error))
