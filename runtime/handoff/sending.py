"""The half of a desk that sends: from "the scheduler begins this request" to "this is how its hand-off ended".

Joins the machine (``comm.kv.sender``) to the requests that it sends for. Everything here is called with the engine's
lock held. On a request's way: between the prefill replica's scheduler and its ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...comm.kv.sender import KvSender
from ...comm.kv.transfer import (
    Close,
    Ended,
    Ending,
    FromReceiver,
    OpenSending,
    Peer,
    Report,
    Tell,
    TransferId,
    TransferLimits,
)
from ..rpc.engine_client import HandOffReport, SendTo
from .ranks import KvMoved
from .stats import HandOffTimes
from .tickets import MAX_HINT_BYTES, hint_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Outbound:
    """What a driver says of a request whose KV is to be sent: ``Sequence.send``.

    Units: deadline_s, of the request, seconds on the engine's clock
    """

    send_to: SendTo
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SendEnded:
    """A request's hand-off is over. ``number``: of its transfer; None when none could begin."""

    request_id: str
    number: int | None
    report: HandOffReport


@dataclass(slots=True)
class _Hand:
    request_id: str
    to: str
    times: HandOffTimes
    wanted: bool = True
    """Whether its request still asks how it ended."""


class SendingHalf:
    """Transfers from this replica, by the numbers that plans name them by."""

    def __init__(
        self, me: Peer, *, ranks: int, release: Callable[[int], None], limits: TransferLimits | None = None
    ) -> None:
        self._me = me
        self._release = release
        self._machine = KvSender(me, ranks=ranks, release=self._let_go, limits=limits)
        self._hands: dict[int, _Hand] = {}

    def __len__(self) -> int:
        """Return the transfers whose blocks are held."""
        return len(self._machine)

    # -------------------------------------------------------------- what the engine says

    def begin(self, now_s: float, request_id: str, outbound: Outbound, *, tokens: int, blocks: int) -> int | Ending:
        """Begin a transfer and return its number, or why none begins."""
        send_to = outbound.send_to
        if send_to.replica == self._me.replica or not 0 < len(hint_of(send_to.ticket)) <= MAX_HINT_BYTES:
            return Ending.BAD_REFERENCE
        timeout_s = outbound.deadline_s - now_s
        if timeout_s <= 0:
            return Ending.DEADLINE
        hint = hint_of(send_to.ticket)
        transfer = self._machine.begin(
            now_s, send_to.replica, tokens=tokens, blocks=blocks, timeout_s=timeout_s, hint=hint
        )
        if transfer is None:
            return Ending.TOO_MANY
        self._hands[transfer.number] = _Hand(request_id, send_to.replica, HandOffTimes(now_s))
        return transfer.number

    def prompt_done(self, now_s: float, number: int, hand_off: bytes) -> None:
        """Note that a prompt is computed, and what goes with it."""
        if (hand := self._hands.get(number)) is not None:
            hand.times.done_s = now_s
        self._machine.prompt_done(now_s, self._id(number), hand_off)

    def cancel(self, number: int) -> None:
        """End a transfer that nobody wants any more; its ending is told to nobody here."""
        if (hand := self._hands.get(number)) is not None:
            hand.wanted = False
        self._machine.cancel(self._id(number))

    # -------------------------------------------------------------- what others say

    def hear(self, now_s: float, message: FromReceiver, peer: Peer) -> None:
        """Take in a message of a life of a replica."""
        self._machine.hear(now_s, message, peer)

    def report(self, now_s: float, report: Report) -> None:
        """Take in what a rank reports."""
        self._machine.report(now_s, report)

    def peer_lost(self, now_s: float, peer: Peer) -> None:
        """Note that a connection to a life of a replica broke."""
        self._machine.peer_lost(now_s, peer)

    def refused(self, replica: str) -> None:
        """Note that a replica takes no KV of this one."""
        for number in [number for number, hand in self._hands.items() if hand.to == replica]:
            self._machine.cancel(self._id(number), Ending.BAD_REFERENCE)

    def tick(self, now_s: float) -> None:
        """Let time pass."""
        self._machine.tick(now_s)

    def take_actions(self) -> list[Tell | OpenSending | Close | Ended]:
        """Return what is to be done, in order, each once."""
        return self._machine.take_actions()

    def ended(self, now_s: float, action: Ended, moved: KvMoved) -> SendEnded | None:
        """Return what a request is told of its transfer's end, None when it does not ask."""
        number = action.transfer.number
        hand = self._hands.pop(number, None)
        if hand is None or not hand.wanted:
            return None
        report = hand.times.report(now_s, action.ending, moved)
        return SendEnded(request_id=hand.request_id, number=number, report=report)

    # -------------------------------------------------------------- inside

    def _id(self, number: int) -> TransferId:
        return TransferId(self._me.replica, self._me.incarnation, number)

    def _let_go(self, transfer: TransferId) -> None:
        self._release(transfer.number)
