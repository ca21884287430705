"""The receiving end of transfers, at the driver of a replica that decodes. Pure: events in, actions out.

Owns the grants, and the one moment at which KV becomes usable: when every rank has applied and checked all that is its
own, and the sender has said what to go on with. It takes blocks through ``BlockLender`` and gives them back when the
transfer is over and no rank can write into them any longer, whoever else still owns them. Time is an argument.

    Reserve ──▶ waiting (for blocks) ──▶ live ──every rank done, Finish──▶ committed ──let_go──▶ gone
                        └───── anything else ─────┴──▶ ending ──every rank drained──▶ gone
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from .endings import Endings
from .transfer import (
    Acknowledged,
    Close,
    Committed,
    Deferred,
    Drained,
    End,
    Ended,
    Ending,
    Finish,
    FromSender,
    Granted,
    Heartbeat,
    OpenReceiving,
    Peer,
    RankBroken,
    RankDone,
    RankOpened,
    Report,
    Reserve,
    Tell,
    TransferId,
    TransferLimits,
)

Action = Tell | OpenReceiving | Close | Committed | Ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Loan:
    """Blocks for a prompt, in its order; positions before ``first_token`` are in them already and are not sent."""

    blocks: tuple[int, ...]
    first_token: int = 0


class BlockLender(Protocol):
    """Who has the blocks: an owner a transfer, beside sequences and the prefix cache."""

    def fits(self, reserve: Reserve) -> bool:
        """Return whether there are blocks enough for it when nothing else runs."""
        ...

    def is_expected(self, reserve: Reserve) -> bool:
        """Return whether somebody here waits for it; one that nobody waits for yet is passed by those that are."""
        ...

    def take(self, reserve: Reserve) -> Loan | None:
        """Make the transfer an owner of blocks for its prompt, or return None and change nothing."""
        ...

    def release(self, transfer: TransferId) -> None:
        """Take the transfer off its blocks."""
        ...


class _State(Enum):
    WAITING = auto()
    LIVE = auto()
    COMMITTED = auto()
    ENDING = auto()


@dataclass(slots=True)
class _Receiving:
    reserve: Reserve
    deadline_s: float
    heard_s: float
    wait_until_s: float
    state: _State = _State.WAITING
    loan: Loan = Loan(blocks=())
    hand_off: bytes | None = None
    unopened: set[int] = field(default_factory=set)
    done: set[int] = field(default_factory=set)
    undrained: set[int] = field(default_factory=set)

    @property
    def transfer(self) -> TransferId:
        return self.reserve.transfer

    @property
    def generation(self) -> int:
        return self.reserve.generation


class KvReceiver:
    """All transfers to this life of a replica."""

    def __init__(self, *, ranks: int, lender: BlockLender, limits: TransferLimits | None = None) -> None:
        self._ranks = frozenset(range(ranks))
        self._lender = lender
        self._limits = limits or TransferLimits()
        self._endings = Endings(max_remembered=self._limits.max_remembered, max_peers=self._limits.max_peers)
        # In the order of their reservations, which is the order in which those that wait are served.
        self._receiving: dict[TransferId, _Receiving] = {}
        self._beat_s = float("-inf")
        self._actions: list[Action] = []

    def __len__(self) -> int:
        """Return the transfers that wait or hold blocks."""
        return len(self._receiving)

    def take_actions(self) -> list[Action]:
        """Return what is to be done, in order, each once."""
        actions, self._actions = self._actions, []
        return actions

    # -------------------------------------------------------------- what the engine says

    def cancel(self, transfer: TransferId, ending: Ending = Ending.CANCELLED) -> None:
        """End a transfer from here, in any state; after its end it only lets go of what was committed."""
        one = self._receiving.get(transfer)
        if one is not None and one.state in (_State.WAITING, _State.LIVE):
            self._end(one, ending, tell=True)
        self.let_go(transfer)

    def let_go(self, transfer: TransferId) -> None:
        """Take the transfer off the blocks of a commitment: the request owns them now, or nobody wants them."""
        one = self._receiving.get(transfer)
        if one is not None and one.state is _State.COMMITTED:
            self._forget(one)

    def peer_lost(self, peer: Peer) -> None:
        """Note that a connection from a life of a replica broke."""
        for one in self._from(peer.replica):
            if one.state is _State.LIVE and one.transfer.incarnation == peer.incarnation:
                self._end(one, Ending.PEER_LOST, tell=True)

    def peer_gone(self, replica: str) -> None:
        """Forget a replica that is in the cluster no longer."""
        for one in self._from(replica):
            if one.state in (_State.WAITING, _State.LIVE):
                self._end(one, Ending.PEER_LOST, tell=False)
        self._endings.forget(replica)

    def report(self, report: Report) -> None:
        """Take in what a rank reports."""
        one = self._receiving.get(report.transfer)
        if one is None or report.generation != one.generation:
            return
        match report:
            case RankOpened(rank=rank):
                one.unopened.discard(rank)
                if one.state is _State.LIVE and not one.unopened:
                    self._say_granted(one)
            case RankDone(rank=rank):
                one.done.add(rank)
                self._maybe_commit(one)
            case RankBroken(ending=ending):
                if one.state is _State.LIVE:
                    self._end(one, ending, tell=True)
            case Drained(rank=rank):
                one.undrained.discard(rank)
                if one.state is _State.ENDING and not one.undrained:
                    self._forget(one)

    # -------------------------------------------------------------- what the sender says

    def hear(self, now_s: float, message: FromSender, peer: Peer) -> None:
        """Take in a message from a life of a replica."""
        before = self._endings.life(peer.replica)
        refused = self._endings.meet(peer)
        if refused is not None:
            if isinstance(message, Reserve):
                self._tell(peer.replica, _end(message.transfer, message.generation, refused))
            return
        if before != peer.incarnation:
            for one in self._from(peer.replica):
                if one.transfer.incarnation < peer.incarnation and one.state in (_State.WAITING, _State.LIVE):
                    self._end(one, Ending.PEER_RESTARTED, tell=False)
        match message:
            case Heartbeat(alive=alive):
                for transfer, generation in alive[: self._limits.max_transfers]:
                    self._alive(now_s, transfer, generation, peer)
            case _ if message.transfer.source != peer:
                self._tell(peer.replica, _end(message.transfer, message.generation, Ending.BAD_REFERENCE))
            case Reserve():
                self._reserve(now_s, message)
            case Finish():
                self._finish(now_s, message)
            case End():
                self._ended_there(message)

    def tick(self, now_s: float) -> None:
        """Let time pass: deadlines and leases end, those that wait are served, heartbeats go out."""
        for one in list(self._receiving.values()):
            if one.state not in (_State.WAITING, _State.LIVE):
                continue
            if now_s >= one.deadline_s:
                self._end(one, Ending.DEADLINE, tell=True)
            elif now_s >= one.heard_s + self._limits.lease_s:
                self._end(one, Ending.LEASE_EXPIRED, tell=True)
            elif one.state is _State.WAITING and now_s >= one.wait_until_s:
                self._end(one, Ending.NO_ROOM, tell=True)
        self._serve_waiting()
        if now_s >= self._beat_s + self._limits.heartbeat_s:
            self._beat_s = now_s
            self._beat()

    # -------------------------------------------------------------- inside

    def _reserve(self, now_s: float, message: Reserve) -> None:
        one = self._receiving.get(message.transfer)
        if one is not None:
            self._reserve_again(now_s, one, message)
            return
        why_not = self._endings.why_not(message.transfer, message.generation)
        too_long = len(message.hint) > self._limits.max_hint_bytes
        if why_not is None and (message.tokens < 1 or message.generation < 1 or too_long):
            why_not = Ending.BAD_REFERENCE
        if why_not is None and (message.tokens > self._limits.max_tokens or not self._lender.fits(message)):
            why_not = Ending.NEVER_FITS
        if why_not is None and len(self._receiving) >= self._limits.max_transfers:
            why_not = Ending.TOO_MANY
        if why_not is not None:
            self._answer_ended(message.transfer, message.generation, why_not)
            return
        # A deadline that is no number, or further than any, would keep the blocks for ever.
        timeout_s = message.timeout_s if 0 < message.timeout_s < 1e6 else 0.0
        one = _Receiving(message, now_s + timeout_s, now_s, now_s + self._limits.max_wait_s)
        waiting = [each.reserve for each in self._receiving.values() if each.state is _State.WAITING]
        self._receiving[one.transfer] = one
        lender = self._lender
        if lender.is_expected(message) and not any(map(lender.is_expected, waiting)) and self._grant(one):
            return
        if len(waiting) >= self._limits.max_waiting:
            self._end(one, Ending.NO_ROOM, tell=True)
            return
        self._tell(one.transfer.replica, Deferred(transfer=one.transfer, generation=one.generation))

    def _reserve_again(self, now_s: float, one: _Receiving, message: Reserve) -> None:
        """Answer what was answered, once more; end the older of two generations."""
        if message.generation != one.generation:
            if message.generation > one.generation and one.state in (_State.WAITING, _State.LIVE):
                # The next generation is taken in when it asks again, and no rank can write for this one.
                self._end(one, Ending.STALE, tell=False)
            elif one.state is _State.COMMITTED:
                self._acknowledge(one)
            return
        one.heard_s = now_s
        match one.state:
            case _State.WAITING:
                self._tell(one.transfer.replica, Deferred(transfer=one.transfer, generation=one.generation))
            case _State.LIVE:
                if not one.unopened:
                    self._say_granted(one)
            case _State.COMMITTED:
                self._acknowledge(one)
            case _State.ENDING:
                self._answer_ended(one.transfer, one.generation, Ending.STALE)

    def _grant(self, one: _Receiving) -> bool:
        loan = self._lender.take(one.reserve)
        if loan is None:
            return False
        assert 0 <= loan.first_token <= one.reserve.tokens, "a loan begins within its prompt"
        one.loan = loan
        one.state = _State.LIVE
        one.undrained = set(self._ranks)
        # The sender is told when all have opened it: a frame could be faster than the word that it may be written.
        one.unopened = set(self._ranks)
        self._actions.append(
            OpenReceiving(
                transfer=one.transfer,
                generation=one.generation,
                tokens=range(loan.first_token, one.reserve.tokens),
                blocks=loan.blocks,
            )
        )
        return True

    def _say_granted(self, one: _Receiving) -> None:
        granted = Granted(
            transfer=one.transfer,
            generation=one.generation,
            blocks=one.loan.blocks,
            first_token=one.loan.first_token,
        )
        self._tell(one.transfer.replica, granted)

    def _serve_waiting(self) -> None:
        # In order: a large prompt is not overtaken for ever by small ones.
        for one in self._receiving.values():
            expected = one.state is _State.WAITING and self._lender.is_expected(one.reserve)
            if expected and not self._grant(one):
                return

    def _finish(self, now_s: float, message: Finish) -> None:
        one = self._receiving.get(message.transfer)
        if one is None or one.generation != message.generation or one.state is _State.ENDING:
            self._alive(now_s, message.transfer, message.generation, message.transfer.source)
            return
        one.heard_s = now_s
        if len(message.hand_off) > self._limits.max_hand_off_bytes:
            if one.state is not _State.COMMITTED:
                self._end(one, Ending.BAD_REFERENCE, tell=True)
        elif one.state is _State.COMMITTED:
            self._acknowledge(one)
        elif one.state is _State.LIVE:
            one.hand_off = message.hand_off
            self._maybe_commit(one)

    def _maybe_commit(self, one: _Receiving) -> None:
        if one.state is not _State.LIVE or one.hand_off is None or one.done != self._ranks:
            return
        one.state = _State.COMMITTED
        self._endings.put(one.transfer, one.generation, Ending.COMMITTED)
        self._actions += (
            Close(transfer=one.transfer, generation=one.generation),
            Committed(transfer=one.transfer, blocks=one.loan.blocks, hand_off=one.hand_off),
            Ended(transfer=one.transfer, generation=one.generation, ending=Ending.COMMITTED),
        )
        self._acknowledge(one)

    def _alive(self, now_s: float, transfer: TransferId, generation: int, peer: Peer) -> None:
        """Renew a lease, or say that there is nothing to renew."""
        if transfer.source != peer:
            return
        one = self._receiving.get(transfer)
        if one is not None and one.generation == generation:
            one.heard_s = now_s
            if one.state is not _State.ENDING:
                return
        if one is not None and one.generation < generation:
            # Its reservation is on the way, or waits for this generation to be over.
            return
        self._answer_ended(transfer, generation, self._endings.why_not(transfer, generation) or Ending.UNKNOWN)

    def _answer_ended(self, transfer: TransferId, generation: int, ending: Ending) -> None:
        if ending is Ending.COMMITTED:
            self._tell(transfer.replica, Acknowledged(transfer=transfer, generation=generation))
        else:
            self._tell(transfer.replica, _end(transfer, generation, ending))

    def _ended_there(self, message: End) -> None:
        one = self._receiving.get(message.transfer)
        if one is not None and one.state in (_State.WAITING, _State.LIVE) and one.generation <= message.generation:
            self._end(one, message.ending, tell=False, by_peer=True)
        # It may have overtaken the reservation, which must not be granted when it comes.
        ending = message.ending if message.ending is not Ending.COMMITTED else Ending.BAD_REFERENCE
        self._endings.put(message.transfer, message.generation, ending)

    def _end(self, one: _Receiving, ending: Ending, *, tell: bool, by_peer: bool = False) -> None:
        if tell:
            self._tell(one.transfer.replica, _end(one.transfer, one.generation, ending))
        self._endings.put(one.transfer, one.generation, ending)
        if one.undrained:
            self._actions.append(Close(transfer=one.transfer, generation=one.generation))
        one.state = _State.ENDING
        self._actions.append(Ended(transfer=one.transfer, generation=one.generation, ending=ending, by_peer=by_peer))
        if not one.undrained:
            self._forget(one)

    def _forget(self, one: _Receiving) -> None:
        del self._receiving[one.transfer]
        if one.loan.blocks:
            self._lender.release(one.transfer)

    def _acknowledge(self, one: _Receiving) -> None:
        self._tell(one.transfer.replica, Acknowledged(transfer=one.transfer, generation=one.generation))

    def _beat(self) -> None:
        alive: dict[str, list[tuple[TransferId, int]]] = {}
        for one in self._receiving.values():
            if one.state in (_State.WAITING, _State.LIVE):
                alive.setdefault(one.transfer.replica, []).append((one.transfer, one.generation))
        for replica, transfers in alive.items():
            self._tell(replica, Heartbeat(alive=tuple(transfers)))

    def _from(self, replica: str) -> list[_Receiving]:
        return [one for one in self._receiving.values() if one.transfer.replica == replica]

    def _tell(self, replica: str, message: Granted | Deferred | Acknowledged | End | Heartbeat) -> None:
        self._actions.append(Tell(replica=replica, message=message))


def _end(transfer: TransferId, generation: int, ending: Ending) -> End:
    return End(transfer=transfer, generation=generation, ending=ending)
