"""The sending end of transfers, at the driver of a replica that computes prompts. Pure: events in, actions out.

Owns every transfer from the reservation to its one ending, and decides when its blocks may go. It knows neither blocks'
contents nor layers: ranks post those by themselves (``outgoing``), from the moment a grant is handed to them. Time is
an argument, monotonic seconds of this process.

    reserving ──Granted──▶ posting ──all sent, prompt done──▶ finishing ──Acknowledged──▶ ended: committed
        │ Deferred            ▲                                   │
        └──────▶ parked ──────┘          anything else ends it, or begins again with the next generation
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from .parked import ParkedStore
from .transfer import (
    WORTH_ANOTHER_TRY,
    Acknowledged,
    Close,
    Deferred,
    Drained,
    End,
    Ended,
    Ending,
    Finish,
    FromReceiver,
    Granted,
    Heartbeat,
    OpenSending,
    Peer,
    RankBroken,
    RankDone,
    Report,
    Reserve,
    Tell,
    TransferId,
    TransferLimits,
)

Action = Tell | OpenSending | Close | Ended


class _State(Enum):
    RESERVING = auto()
    PARKED = auto()
    POSTING = auto()
    FINISHING = auto()
    DRAINING = auto()
    """Ranks let go of one generation before the next begins."""
    ENDING = auto()
    """Ended; ranks may still read its blocks."""


@dataclass(slots=True)
class _Sending:
    transfer: TransferId
    to: str
    tokens: int
    blocks: int
    hint: bytes
    deadline_s: float
    answer_by_s: float
    heard_s: float
    said_s: float
    state: _State = _State.RESERVING
    generation: int = 1
    receiver: int | None = None
    hand_off: bytes | None = None
    sent: set[int] = field(default_factory=set)
    undrained: set[int] = field(default_factory=set)


class KvSender:
    """All transfers that this life of a replica sends.

    ``release``: called once a transfer, when nothing here touches its blocks any longer.
    """

    def __init__(
        self, me: Peer, *, ranks: int, release: Callable[[TransferId], None], limits: TransferLimits | None = None
    ) -> None:
        self._me = me
        self._ranks = frozenset(range(ranks))
        self._release = release
        self._limits = limits or TransferLimits()
        self._parked = ParkedStore(max_blocks=self._limits.max_parked_blocks, lease_s=self._limits.lease_s)
        self._sending: dict[TransferId, _Sending] = {}
        self._number = 0
        self._lives: dict[str, int] = {}
        self._beat_s = float("-inf")
        self._actions: list[Action] = []

    def __len__(self) -> int:
        """Return the transfers whose blocks are held."""
        return len(self._sending)

    @property
    def parked_blocks(self) -> int:
        """Blocks of transfers that wait for room at their receiver."""
        return self._parked.blocks

    def take_actions(self) -> list[Action]:
        """Return what is to be done, in order, each once."""
        actions, self._actions = self._actions, []
        return actions

    # -------------------------------------------------------------- what the engine says

    def begin(
        self, now_s: float, to: str, *, tokens: int, blocks: int, timeout_s: float, hint: bytes = b""
    ) -> TransferId | None:
        """Begin a transfer to a replica, None when too many are on their way; the caller holds blocks for it.

        Units: blocks, what parking it takes; timeout_s, until the request's deadline
        """
        if len(self._sending) >= self._limits.max_transfers:
            return None
        self._number += 1
        transfer = TransferId(self._me.replica, self._me.incarnation, self._number)
        one = _Sending(
            transfer, to, tokens, blocks, hint, now_s + timeout_s, now_s + self._limits.answer_timeout_s, now_s, now_s
        )
        self._sending[transfer] = one
        self._reserve(now_s, one)
        return transfer

    def prompt_done(self, now_s: float, transfer: TransferId, hand_off: bytes) -> None:
        """Note that the prompt is computed, and what the receiver goes on with; of no effect on one that ended."""
        one = self._sending.get(transfer)
        if one is not None and one.state is not _State.ENDING:
            one.hand_off = hand_off
            self._maybe_finish(now_s, one)

    def cancel(self, transfer: TransferId, ending: Ending = Ending.CANCELLED) -> None:
        """End a transfer from here, in any state; again, or after its end, it does nothing."""
        one = self._sending.get(transfer)
        if one is not None and one.state is not _State.ENDING:
            self._end(one, ending, tell=True)

    def peer_lost(self, now_s: float, peer: Peer) -> None:
        """Note that a connection to a life of a replica broke: what went over it may never have arrived."""
        for one in self._to(peer.replica):
            if one.receiver == peer.incarnation and one.state in (_State.POSTING, _State.FINISHING):
                self._lose(now_s, one, Ending.PEER_LOST, tell=True)

    def report(self, now_s: float, report: Report) -> None:
        """Take in what a rank reports."""
        one = self._sending.get(report.transfer)
        if one is None or report.generation != one.generation:
            return
        match report:
            case RankDone(rank=rank):
                one.sent.add(rank)
                self._maybe_finish(now_s, one)
            case RankBroken(ending=ending):
                if one.state in (_State.POSTING, _State.FINISHING):
                    self._lose(now_s, one, ending, tell=True)
            case Drained(rank=rank):
                one.undrained.discard(rank)
                self._when_drained(now_s, one)

    # -------------------------------------------------------------- what the receiver says

    def hear(self, now_s: float, message: FromReceiver, peer: Peer) -> None:
        """Take in a message from a life of a replica."""
        if peer.incarnation < self._lives.get(peer.replica, peer.incarnation):
            return
        self._note_life(now_s, peer)
        if isinstance(message, Heartbeat):
            for transfer, generation in message.alive[: self._limits.max_transfers]:
                one = self._current(transfer, generation, peer)
                if one is None:
                    self._tell(peer.replica, End(transfer=transfer, generation=generation, ending=Ending.UNKNOWN))
                else:
                    self._renew(now_s, one)
            return
        if isinstance(message, Acknowledged):
            self._acknowledged(message, peer)
            return
        one = self._current(message.transfer, message.generation, peer)
        if one is None:
            if isinstance(message, Granted | Deferred):
                end = End(transfer=message.transfer, generation=message.generation, ending=Ending.UNKNOWN)
                self._tell(peer.replica, end)
            return
        self._renew(now_s, one)
        match message:
            case Granted():
                self._granted(one, message, peer)
            case Deferred():
                self._deferred(now_s, one)
            case End(ending=ending):
                self._lose(now_s, one, ending, by_peer=True)

    def tick(self, now_s: float) -> None:
        """Let time pass: deadlines and leases end, messages are said again, heartbeats go out."""
        limits = self._limits
        expired = set(self._parked.expired(now_s))
        for one in list(self._sending.values()):
            match one.state:
                case _State.ENDING:
                    continue
                case _ if now_s >= one.deadline_s:
                    self._end(one, Ending.DEADLINE, tell=True)
                    continue
                case _State.RESERVING if now_s >= one.answer_by_s:
                    self._end(one, Ending.NO_ANSWER, tell=True)
                    continue
                case _State.POSTING if now_s >= one.heard_s + limits.lease_s:
                    self._lose(now_s, one, Ending.LEASE_EXPIRED, tell=True)
                    continue
                case _State.FINISHING if now_s >= one.heard_s + limits.lease_s:
                    self._lose(now_s, one, Ending.UNACKNOWLEDGED, tell=True)
                    continue
                case _State.PARKED if one.transfer in expired:
                    self._lose(now_s, one, Ending.LEASE_EXPIRED, tell=True)
                    continue
            if now_s >= one.said_s + limits.resend_s:
                self._say_again(now_s, one)
        if now_s >= self._beat_s + limits.heartbeat_s:
            self._beat_s = now_s
            self._beat()

    # -------------------------------------------------------------- inside

    def _reserve(self, now_s: float, one: _Sending) -> None:
        one.said_s = now_s
        left_s = one.deadline_s - now_s
        ask = Reserve(
            transfer=one.transfer, generation=one.generation, tokens=one.tokens, timeout_s=left_s, hint=one.hint
        )
        self._tell(one.to, ask)

    def _granted(self, one: _Sending, message: Granted, peer: Peer) -> None:
        if one.state not in (_State.RESERVING, _State.PARKED):
            return
        self._parked.remove(one.transfer)
        one.receiver = peer.incarnation
        if not 0 <= message.first_token <= one.tokens:
            self._end(one, Ending.BAD_REFERENCE, tell=True)
            return
        one.state = _State.POSTING
        one.undrained = set(self._ranks)
        self._actions.append(
            OpenSending(
                transfer=one.transfer,
                generation=one.generation,
                to=peer,
                tokens=range(message.first_token, one.tokens),
                blocks=message.blocks,
            )
        )

    def _deferred(self, now_s: float, one: _Sending) -> None:
        if one.state is _State.RESERVING:
            if self._parked.add(now_s, one.transfer, one.blocks):
                one.state = _State.PARKED
            else:
                self._end(one, Ending.PARKED_FULL, tell=True)

    def _acknowledged(self, message: Acknowledged, peer: Peer) -> None:
        """A commitment counts whatever generation it was, unless a later life of the receiver has it now."""
        one = self._sending.get(message.transfer)
        if one is None or one.state is _State.ENDING or one.to != peer.replica:
            return
        if message.generation <= one.generation and one.receiver in (None, peer.incarnation):
            self._end(one, Ending.COMMITTED, tell=False)

    def _maybe_finish(self, now_s: float, one: _Sending) -> None:
        if one.state is _State.POSTING and one.hand_off is not None and one.sent == self._ranks:
            one.state = _State.FINISHING
            self._finish(now_s, one)

    def _finish(self, now_s: float, one: _Sending) -> None:
        assert one.hand_off is not None
        one.said_s = now_s
        self._tell(one.to, Finish(transfer=one.transfer, generation=one.generation, hand_off=one.hand_off))

    def _say_again(self, now_s: float, one: _Sending) -> None:
        match one.state:
            case _State.RESERVING | _State.PARKED:
                # A grant that was lost on its way is said again in answer to this.
                self._reserve(now_s, one)
            case _State.FINISHING:
                self._finish(now_s, one)
            case _:
                pass

    def _lose(self, now_s: float, one: _Sending, ending: Ending, *, tell: bool = False, by_peer: bool = False) -> None:
        """End a generation; begin the next when that makes sense, else end the transfer."""
        again = ending in WORTH_ANOTHER_TRY and one.generation < self._limits.max_tries and now_s < one.deadline_s
        if one.state is _State.DRAINING:
            return
        if not again:
            self._end(one, ending, tell=tell, by_peer=by_peer)
            return
        if tell:
            self._tell(one.to, End(transfer=one.transfer, generation=one.generation, ending=ending))
        self._close(one)
        one.state = _State.DRAINING
        self._when_drained(now_s, one)

    def _end(self, one: _Sending, ending: Ending, *, tell: bool, by_peer: bool = False) -> None:
        if tell:
            self._tell(one.to, End(transfer=one.transfer, generation=one.generation, ending=ending))
        if one.state is not _State.DRAINING:
            self._close(one)
        one.state = _State.ENDING
        self._actions.append(Ended(transfer=one.transfer, generation=one.generation, ending=ending, by_peer=by_peer))
        if not one.undrained:
            self._forget(one)

    def _close(self, one: _Sending) -> None:
        self._parked.remove(one.transfer)
        if one.undrained:
            self._actions.append(Close(transfer=one.transfer, generation=one.generation))

    def _when_drained(self, now_s: float, one: _Sending) -> None:
        if one.undrained:
            return
        if one.state is _State.ENDING:
            self._forget(one)
        elif one.state is _State.DRAINING:
            one.state = _State.RESERVING
            one.generation += 1
            one.receiver = None
            one.sent.clear()
            one.heard_s = now_s
            one.answer_by_s = now_s + self._limits.answer_timeout_s
            self._reserve(now_s, one)

    def _forget(self, one: _Sending) -> None:
        del self._sending[one.transfer]
        self._release(one.transfer)

    def _note_life(self, now_s: float, peer: Peer) -> None:
        if self._lives.get(peer.replica) == peer.incarnation:
            return
        if len(self._lives) >= self._limits.max_peers and peer.replica not in self._lives:
            # Lives only save us from stale words; those of replicas that nothing goes to are of no use.
            in_use = {one.to for one in self._sending.values()}
            self._lives = {replica: life for replica, life in self._lives.items() if replica in in_use}
        self._lives[peer.replica] = peer.incarnation
        for one in self._to(peer.replica):
            granted = one.state in (_State.POSTING, _State.FINISHING)
            if granted and one.receiver is not None and one.receiver < peer.incarnation:
                self._lose(now_s, one, Ending.PEER_RESTARTED)

    def _current(self, transfer: TransferId, generation: int, peer: Peer) -> _Sending | None:
        """Return a transfer that a message of this peer may speak of, None for one that is over or another's."""
        one = self._sending.get(transfer)
        if one is None or one.to != peer.replica or one.generation != generation:
            return None
        if one.state in (_State.ENDING, _State.DRAINING) or one.receiver not in (None, peer.incarnation):
            return None
        return one

    def _renew(self, now_s: float, one: _Sending) -> None:
        one.heard_s = now_s
        self._parked.renew(now_s, one.transfer)

    def _beat(self) -> None:
        alive: dict[str, list[tuple[TransferId, int]]] = {}
        for one in self._sending.values():
            if one.state in (_State.PARKED, _State.POSTING, _State.FINISHING):
                alive.setdefault(one.to, []).append((one.transfer, one.generation))
        for replica, transfers in alive.items():
            self._tell(replica, Heartbeat(alive=tuple(transfers)))

    def _to(self, replica: str) -> list[_Sending]:
        return [one for one in self._sending.values() if one.to == replica]

    def _tell(self, replica: str, message: Reserve | Finish | End | Heartbeat) -> None:
        self._actions.append(Tell(replica=replica, message=message))
