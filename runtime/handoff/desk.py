"""A replica's hand-off desk: both machines of ``comm/kv``, and the thread that keeps their promises.

Everything that decides happens with the engine's lock held, which is never held while a step computes: heartbeats and
leases do not wait for steps. Actions are carried out by the desk's own thread alone, in their order. Messages, reports
and lost peers come in through a queue from any thread.

    engine's thread ── start, prompt_done, expect ──▶ halves ◀── hear, report, tick ── desk's thread ◀── lines, ranks
                                                        └──── actions ────▶ desk's thread ──▶ lines, ranks, driver
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

from ...comm.kv.transfer import (
    Close,
    Committed,
    Ended,
    Ending,
    FromReceiver,
    FromSender,
    OpenReceiving,
    OpenSending,
    Peer,
    Report,
    Tell,
    TransferLimits,
)
from ...comm.kv.transport import PeerDown
from ..clock import Clock
from ..engine.sequence import Sequence
from ..messages import EngineRequest, TokenLogprobs
from .hand_off import HandOff, encode_hand_off
from .lines import Lines
from .rank_orders import CloseTransfer, ForgetTransfer, KvOrder, OpenReceive, OpenSend
from .ranks import KvMoved, KvRanks
from .receiving import Arrived, LoanBook, ReceivingHalf
from .sending import Outbound, SendEnded, SendingHalf
from .stats import DeskLoad, HandOffTimes
from .tickets import known_tokens

logger = logging.getLogger(__name__)

_MAX_QUEUED = 1 << 16
_CLOSE_TIMEOUT_S = 5.0


class DeskLoans(LoanBook, Protocol):
    """The scheduler, as a desk knows it: what was lent, and what is held for transfers from here."""

    def release_sent(self, number: int) -> None:
        """Take a transfer from here off its blocks."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DeskFailed:
    """The desk cannot go on, and so neither can the engine: blocks might be held for ever."""

    error: Exception


DeskEvent = Arrived | SendEnded | DeskFailed

_Mail = Callable[[float], None]


class HandOffDesk:
    """Hands requests on from this replica and takes them in; a ``KvSending`` to its scheduler. Has to be closed.

    ``lock``: the engine's, reentrant. ``loans``: the scheduler, touched with the lock held only.
    Units: tick_s, between looks at what is due while anything is on its way
    """

    def __init__(
        self,
        me: Peer,
        *,
        lock: AbstractContextManager[object],
        loans: DeskLoans,
        ranks: KvRanks,
        lines: Lines,
        vocab_size: int,
        block_size: int,
        clock: Clock,
        limits: TransferLimits | None = None,
        tick_s: float = 0.1,
    ) -> None:
        self._me = me
        self._lock = lock
        self._ranks = ranks
        self._lines = lines
        self._block_size = block_size
        self._clock = clock
        self._tick_s = tick_s
        count = ranks.offer.layout.ranks
        self._sending = SendingHalf(me, ranks=count, release=loans.release_sent, limits=limits)
        self._receiving = ReceivingHalf(ranks=count, loans=loans, vocab_size=vocab_size, limits=limits)
        self._tell: Callable[[DeskEvent], None] = _nobody
        self._mail: SimpleQueue[_Mail] = SimpleQueue()
        self._tick_due_s = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="slipstream-hand-off", daemon=True)
        ranks.listen(self._heard_rank)
        lines.listen(self)

    def begin(self, tell: Callable[[DeskEvent], None]) -> None:
        """Start the desk's thread; ``tell`` is called from it, and from the engine's, and must not wait."""
        self._tell = tell
        self._thread.start()

    def close(self) -> None:
        """End everything: transfers that are on their way are lost. Idempotent."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._mail.put(_nothing)
        if self._thread.is_alive():
            self._thread.join(_CLOSE_TIMEOUT_S)
        self._lines.close()
        self._ranks.close()

    @property
    def load(self) -> DeskLoad:
        """Return how busy the desk is; called with the engine's lock held."""
        moved = self._ranks.moved()
        return DeskLoad(
            awaiting=self._receiving.awaiting,
            sending=len(self._sending),
            receiving=len(self._receiving),
            kv_bytes_out=moved.bytes_out,
            kv_bytes_in=moved.bytes_in,
        )

    # ------------------------------------------------------------------ the engine's thread, its lock held: sending

    def start(self, sequence: Sequence) -> int | None:
        """Begin the transfer of a sequence that begins to run; see ``engine.kv_sending``."""
        outbound = sequence.send
        assert isinstance(outbound, Outbound), f"{sequence} is to be sent to {outbound!r}"
        now_s = self._clock()
        tokens = known_tokens(sequence.request)
        begun: int | Ending = Ending.BAD_REFERENCE
        if self._lines.open(outbound.send_to.replica, outbound.send_to.address):
            begun = self._sending.begin(
                now_s, sequence.request_id, outbound, tokens=tokens, blocks=-(-tokens // self._block_size)
            )
        if isinstance(begun, Ending):
            report = HandOffTimes(now_s).report(now_s, begun, KvMoved())
            self._tell(SendEnded(request_id=sequence.request_id, number=None, report=report))
            return None
        self._wake()
        return begun

    def stop(self, number: int) -> None:
        """End a transfer whose sequence was preempted, aborted, or ended otherwise than with a token to go on from."""
        self._sending.cancel(number)
        self._wake()

    def prompt_done(self, number: int, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Note that a sequence's prompt is computed, and with which token its receiver goes on."""
        hand_off = encode_hand_off(HandOff(token_id=token_id, logprobs=logprobs))
        self._sending.prompt_done(self._clock(), number, hand_off)
        self._wake()

    # ------------------------------------------------------------------ the engine's thread, its lock held: receiving

    def expect(self, ticket: str, request: EngineRequest) -> bool:
        """Let a request wait for its KV, until ``Arrived`` or ``leave``; False when the ticket is another's."""
        expected = self._receiving.expect(self._clock(), ticket, request)
        self._wake()
        return expected

    def leave(self, ticket: str) -> None:
        """Let a request wait no longer: it ended, or is computed here."""
        self._receiving.leave(ticket)
        self._wake()

    def adopted(self, arrived: Arrived) -> None:
        """Note that the sequence that was made of a request owns its blocks."""
        self._receiving.adopted(arrived.ticket, arrived.transfer)
        self._wake()

    def drop(self, arrived: Arrived) -> None:
        """Let go of KV that came for a request which cannot go on with it, or is gone."""
        self._receiving.drop(arrived.transfer)
        self._wake()

    # ------------------------------------------------------------------ any thread

    def heard_sender(self, message: FromSender, peer: Peer) -> None:
        """Take in a message of a replica that sends to this one; one too many is dropped, as messages may be."""
        self._post(lambda now_s: self._receiving.hear(now_s, message, peer))

    def heard_receiver(self, message: FromReceiver, peer: Peer) -> None:
        """Take in a message of a replica that this one sends to, likewise."""
        self._post(lambda now_s: self._sending.hear(now_s, message, peer))

    def receiver_refused(self, replica: str) -> None:
        """Note that a replica takes no KV of ours: waiting for its answer is of no use."""
        self._mail.put(lambda now_s: self._sending.refused(replica))

    def _heard_rank(self, rank: int, word: Report | PeerDown) -> None:
        # Never too many: as many as orders were given, and connections were made.
        if isinstance(word, PeerDown):
            logger.warning("rank %d lost rank %d of %s: %s", rank, word.peer.rank, word.peer.peer.replica, word.why)
            self._mail.put(lambda now_s: self._lost(now_s, word.peer.peer))
        elif word.transfer.source == self._me:
            self._mail.put(lambda now_s: self._sending.report(now_s, word))
        else:
            self._mail.put(lambda now_s: self._receiving.report(word))

    def _lost(self, now_s: float, peer: Peer) -> None:
        self._sending.peer_lost(now_s, peer)
        self._receiving.peer_lost(peer)

    def _post(self, mail: _Mail) -> None:
        if self._mail.qsize() < _MAX_QUEUED:
            self._mail.put(mail)

    def _wake(self) -> None:
        self._mail.put(_nothing)

    # ------------------------------------------------------------------ the desk's thread

    def _run(self) -> None:
        try:
            while not self._closed.is_set():
                self._turn(self._take())
        except Exception as error:
            logger.exception("the hand-off desk failed")
            self._tell(DeskFailed(error=error))

    def _take(self) -> list[_Mail]:
        """Wait for mail, or for the next look at what is due."""
        busy = bool(len(self._sending) or len(self._receiving))
        wait_s = max(0.0, self._tick_due_s - self._clock()) if busy else None
        mail: list[_Mail] = []
        try:
            mail.append(self._mail.get(timeout=wait_s))
            while True:
                mail.append(self._mail.get_nowait())
        except Empty:
            return mail

    def _turn(self, mail: list[_Mail]) -> None:
        todo: list[Callable[[], object]] = []
        with self._lock:
            for each in mail:
                each(self._clock())
            now_s = self._clock()
            if now_s >= self._tick_due_s:
                self._tick_due_s = now_s + self._tick_s
                self._sending.tick(now_s)
                self._receiving.tick(now_s)
            # What cannot be done makes further actions.
            while actions := self._sending.take_actions():
                todo += [act for action in actions for act in self._outward(now_s, action)]
            while actions_in := self._receiving.take_actions():
                todo += [act for action in actions_in for act in self._inward(action)]
        for act in todo:
            act()

    def _outward(self, now_s: float, action: Tell | OpenSending | Close | Ended) -> list[Callable[[], object]]:
        """Return what a sending end's action comes down to."""
        match action:
            case Tell(replica=replica, message=message):
                return [lambda: self._lines.say_to_receiver(replica, message)]  # type: ignore[arg-type]
            case OpenSending():
                target = self._lines.target(action.to)
                if target is None:
                    self._sending.peer_lost(now_s, action.to)
                    return []
                return [self._order(OpenSend(grant=action, target=target))]
            case Close(transfer=transfer, generation=generation):
                return [self._order(CloseTransfer(transfer=transfer, generation=generation))]
            case Ended(transfer=transfer):
                moved = self._ranks.moved_of(transfer) or KvMoved()
                ended = self._sending.ended(now_s, action, moved)
                forget = self._order(ForgetTransfer(transfer=transfer))
                return [forget] if ended is None else [forget, lambda: self._tell(ended)]

    def _inward(self, action: Tell | OpenReceiving | Close | Committed | Ended) -> list[Callable[[], object]]:
        """Return what a receiving end's action comes down to."""
        match action:
            case Tell(replica=replica, message=message):
                return [lambda: self._lines.say_to_sender(replica, message)]  # type: ignore[arg-type]
            case OpenReceiving(transfer=transfer):
                source = self._lines.source(transfer.source)
                if source is None:
                    self._receiving.peer_lost(transfer.source)
                    return []
                return [self._order(OpenReceive(grant=action, source=source))]
            case Close(transfer=transfer, generation=generation):
                return [self._order(CloseTransfer(transfer=transfer, generation=generation))]
            case Committed():
                arrived = self._receiving.committed(action)
                return [] if arrived is None else [lambda: self._tell(arrived)]
            case Ended():
                self._receiving.ended(action)
                return []

    def _order(self, order: KvOrder) -> Callable[[], object]:
        return lambda: self._ranks.give(order)


def _nobody(event: DeskEvent) -> None:
    raise AssertionError(f"nobody hears {event}: begin the desk first")


def _nothing(now_s: float) -> None:
    del now_s
