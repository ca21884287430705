"""The half of a desk that receives: requests that wait under tickets, and blocks for the KV that comes for them.

Joins the machine (``comm.kv.receiver``) to the scheduler's blocks and to the requests that wait. Everything here is
called with the engine's lock held. On a request's way: before it enters the decode replica's scheduler.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ...comm.kv.receiver import KvReceiver, Loan
from ...comm.kv.transfer import (
    Close,
    Committed,
    Ended,
    Ending,
    FromSender,
    OpenReceiving,
    Peer,
    Report,
    Reserve,
    Tell,
    TransferId,
    TransferLimits,
)
from ..messages import EngineRequest
from .hand_off import HandOff, decode_hand_off
from .tickets import Tickets


class LoanBook(Protocol):
    """Who has the blocks: the scheduler, as far as a desk knows it."""

    def fits_loan(self, request: EngineRequest) -> bool:
        """Return whether there are blocks enough for a request when nothing else runs."""
        ...

    def lend(self, request: EngineRequest, key: Hashable) -> tuple[Sequence[int], int] | None:
        """Make ``key`` an owner of blocks for a request's known tokens, or return None and change nothing.

        Returns the blocks, in the order of positions, and the first position whose KV is not in them yet.
        """
        ...

    def return_loan(self, key: Hashable) -> None:
        """Take ``key`` off its blocks; one that has none, or whose blocks a sequence has adopted, is ignored."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """A request's KV is here, in blocks that belong to ``transfer`` until it is adopted.

    ``hand_off``: None when what came with it cannot be; the request has to be computed here then.
    """

    ticket: str
    transfer: TransferId
    hand_off: HandOff | None


class ReceivingHalf:
    """Transfers to this replica, and who waits for them. A ``BlockLender`` to its machine."""

    def __init__(self, *, ranks: int, loans: LoanBook, vocab_size: int, limits: TransferLimits | None = None) -> None:
        self._loans = loans
        self._vocab_size = vocab_size
        self._tickets = Tickets()
        self._by_transfer: dict[TransferId, str] = {}
        self._replaced: list[TransferId] = []
        self._machine = KvReceiver(ranks=ranks, lender=self, limits=limits)

    def __len__(self) -> int:
        """Return the transfers that wait or hold blocks."""
        return len(self._machine)

    @property
    def awaiting(self) -> int:
        """Requests that wait."""
        return len(self._tickets)

    # -------------------------------------------------------------- what the engine says

    def expect(self, now_s: float, ticket: str, request: EngineRequest) -> bool:
        """Let a request wait for its KV; False when the ticket is, or was, another's."""
        if self._tickets.add(ticket, request) is None:
            return False
        # Its reservation may have come before it.
        self._machine.tick(now_s)
        self._settle()
        return True

    def leave(self, ticket: str) -> None:
        """Let a request wait no longer, and its transfer end; one that does not wait is ignored."""
        awaited = self._tickets.remove(ticket, Ending.CANCELLED)
        if awaited is not None and awaited.transfer is not None:
            self._machine.cancel(awaited.transfer)
        # Reservations that still wait for blocks under this ticket end when their senders ask again.

    def adopted(self, ticket: str, transfer: TransferId) -> None:
        """Note that a sequence owns the blocks of a transfer now."""
        self._tickets.remove(ticket, Ending.CONSUMED)
        self._machine.let_go(transfer)

    def drop(self, transfer: TransferId) -> None:
        """Let go of KV that nobody wants any more."""
        self._machine.cancel(transfer)

    # -------------------------------------------------------------- what others say

    def hear(self, now_s: float, message: FromSender, peer: Peer) -> None:
        """Take in a message of a life of a replica."""
        self._machine.hear(now_s, message, peer)
        if isinstance(message, Reserve) and message.transfer.source == peer:
            awaited, why_not = self._tickets.of(message), self._tickets.why_not(message)
            if why_not is not None and (awaited is None or awaited.transfer != message.transfer):
                self._machine.cancel(message.transfer, why_not)
        self._settle()

    def report(self, report: Report) -> None:
        """Take in what a rank reports."""
        self._machine.report(report)

    def peer_lost(self, peer: Peer) -> None:
        """Note that a connection from a life of a replica broke."""
        self._machine.peer_lost(peer)

    def tick(self, now_s: float) -> None:
        """Let time pass."""
        self._machine.tick(now_s)
        self._settle()

    def take_actions(self) -> list[Tell | OpenReceiving | Close | Committed | Ended]:
        """Return what is to be done, in order, each once."""
        return self._machine.take_actions()

    def committed(self, action: Committed) -> Arrived | None:
        """Return what a request is told of the KV that has come; None when nobody wants it."""
        ticket = self._by_transfer.get(action.transfer)
        awaited = None if ticket is None else self._tickets.find(ticket)
        if awaited is None or awaited.transfer != action.transfer:
            self._machine.cancel(action.transfer)
            return None
        awaited.arrived = True
        hand_off = decode_hand_off(action.hand_off, vocab_size=self._vocab_size)
        return Arrived(ticket=awaited.ticket, transfer=action.transfer, hand_off=hand_off)

    def ended(self, action: Ended) -> None:
        """Note that a transfer is over: after one that did not commit, another may come under its ticket."""
        ticket = self._by_transfer.pop(action.transfer, None)
        awaited = None if ticket is None else self._tickets.find(ticket)
        if awaited is not None and awaited.transfer == action.transfer and action.ending is not Ending.COMMITTED:
            awaited.transfer = None

    # -------------------------------------------------------------- the machine's lender

    def fits(self, reserve: Reserve) -> bool:
        """Return whether there are blocks enough for it when nothing else runs."""
        awaited = self._tickets.of(reserve)
        return awaited is None or self._loans.fits_loan(awaited.request)

    def is_expected(self, reserve: Reserve) -> bool:
        """Return whether somebody here waits for it."""
        return self._tickets.of(reserve) is not None and self._tickets.why_not(reserve) is None

    def take(self, reserve: Reserve) -> Loan | None:
        """Make the transfer an owner of blocks for its prompt, or return None and change nothing."""
        awaited = self._tickets.of(reserve)
        if awaited is None:
            return None
        lent = self._loans.lend(awaited.request, reserve.transfer)
        if lent is None:
            return None
        if awaited.transfer is not None and awaited.transfer != reserve.transfer:
            # Not ended here and now: the machine is in the midst of another.
            self._replaced.append(awaited.transfer)
        awaited.transfer = reserve.transfer
        self._by_transfer[reserve.transfer] = awaited.ticket
        blocks, first_token = lent
        return Loan(blocks=tuple(blocks), first_token=first_token)

    def release(self, transfer: TransferId) -> None:
        """Take the transfer off its blocks."""
        self._loans.return_loan(transfer)

    # -------------------------------------------------------------- inside

    def _settle(self) -> None:
        replaced, self._replaced = self._replaced, []
        for transfer in replaced:
            self._machine.cancel(transfer, Ending.STALE)
