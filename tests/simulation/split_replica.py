"""A replica's driver in an imagined cluster: real engine, hand-offs, desk and machines; made-up rank, lines and time.

The engine computes with the oracle, whose KV proves what was read; the KV that crosses is copied position by position
from and into the blocks that the two schedulers named, each time held against who owns them. What a driver does between
its gateway and its engine is written out here as the driver's loop has it, without threads and sessions.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from queue import Empty
from types import SimpleNamespace
from typing import Any, Protocol, cast

from slipstream.comm.kv.layout import KvOffer
from slipstream.comm.kv.transfer import (
    Drained,
    Ending,
    FromReceiver,
    FromSender,
    Peer,
    PeerRank,
    RankBroken,
    RankDone,
    RankOpened,
    TransferId,
    TransferLimits,
)
from slipstream.comm.kv.transport import PeerDown
from slipstream.placement.kv_routes import KvLayout
from slipstream.runtime.config import SchedulerConfig
from slipstream.runtime.engine.engine import Engine
from slipstream.runtime.engine.kv_sending import sent_key
from slipstream.runtime.engine.scheduler import Scheduler
from slipstream.runtime.engine.sequence import Sequence, SequenceState
from slipstream.runtime.handoff.desk import DeskChanged, DeskEvent, HandOffDesk
from slipstream.runtime.handoff.rank_orders import (
    CloseTransfer,
    ForgetTransfer,
    KvOrder,
    KvTarget,
    OpenReceive,
    OpenSend,
)
from slipstream.runtime.handoff.ranks import KvMoved, RankListener
from slipstream.runtime.handoff.receiving import Arrived
from slipstream.runtime.handoff.sending import SendEnded
from slipstream.runtime.messages import EngineRequest
from slipstream.runtime.rpc.engine_client import BlockChanges, EngineFacts, EngineLoadReport, HandOffReport, SendTo
from slipstream.runtime.worker.driver_hand_off import HandOffs
from slipstream.runtime.worker.driver_session import LiveRequest, News
from slipstream.sdk.errors import DeadlineExceeded, SlipstreamError
from slipstream.tests.engine.split_world import SendingOracle
from slipstream.tests.fakes.oracle_executor import VOCABULARY
from slipstream.tests.simulation.kv_replicas import Wrong

LIMITS = TransferLimits(
    lease_s=4.0, heartbeat_s=1.0, resend_s=1.0, answer_timeout_s=3.0, max_wait_s=6.0, max_parked_blocks=6, max_waiting=3
)
LAYOUT = KvLayout(layers=1, kv_heads=1, block_size=4, tp=1, pp=1)
TICK_S = 0.5
MAX_LENGTH = 40


class World(Protocol):
    """What replicas live in."""

    now_s: float
    draw: random.Random

    def later(self, peer: Peer | None, after_s: float, act: Callable[[], None]) -> None:
        """Do something in a life, if it lasts until then."""
        ...

    def life(self, peer: Peer) -> Replica | None:
        """Return a life if it is that replica's now."""
        ...

    def say(self, sender: Peer, to: str, message: FromSender | FromReceiver, *, to_sender: bool) -> None:
        """Carry a message between two desks, or lose it, or carry it twice."""
        ...

    def frame(self, source: PeerRank, target: Peer, arrive: Callable[[], None]) -> None:
        """Carry a frame, unless the connection breaks."""
        ...

    def spoils(self) -> bool:
        """Return whether a frame's bytes change on their way."""
        ...

    def news(self, peer: Peer, word: Word) -> None:
        """Bring the gateway what a driver says."""
        ...


# ------------------------------------------------------------------ what drivers and gateways say


@dataclass(frozen=True, slots=True)
class Token:
    """A sample's next token."""

    key: str
    token_id: int


@dataclass(frozen=True, slots=True)
class SampleEnded:
    """The request's one sample has ended; ``reason`` is the engine's."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A request was refused, or ended by an error."""

    key: str
    error: SlipstreamError


@dataclass(frozen=True, slots=True)
class Handed:
    """What became of one that was to be sent on."""

    key: str
    report: HandOffReport


@dataclass(frozen=True, slots=True)
class Busy:
    """How busy the replica is, and what its cache has got and given up."""

    load: EngineLoadReport
    changes: BlockChanges


Word = Token | SampleEnded | Refused | Handed | Busy


class SteppedDesk(HandOffDesk):
    """A desk whose thread is whoever calls ``turn``."""

    def begin(self, tell: Callable[[DeskEvent], object]) -> None:
        self._tell = tell

    def turn(self) -> None:
        """Do what the thread does when it wakes."""
        mail = []
        with suppress(Empty):
            while True:
                mail.append(self._mail.get_nowait())
        self._turn(mail)


# ------------------------------------------------------------------ its one rank


@dataclass(slots=True)
class _Send:
    order: OpenSend
    posted: int
    reading: int = 0
    closing: bool = False
    said: bool = False


@dataclass(slots=True)
class _Receive:
    order: OpenReceive
    missing: set[int]
    writing: int = 0
    closing: bool = False


class Rank:
    """The only rank of a replica: what it sends and takes in, as ``KvRanks`` is asked for it."""

    def __init__(self, world: World, peer: Peer, oracle: SendingOracle) -> None:
        self.scheduler: Scheduler | None = None
        self._world = world
        self._peer = peer
        self._oracle = oracle
        self._sends: dict[TransferId, _Send] = {}
        self._receives: dict[TransferId, _Receive] = {}
        self._hear: RankListener = lambda rank, report: None
        self._woken: Callable[[], None] = lambda: None
        self._inner_s = 0.0
        self.offer = cast(KvOffer, SimpleNamespace(layout=LAYOUT))
        self.ends = ((),)

    def listen(self, on_report: RankListener) -> None:
        self._hear = on_report

    def wakes(self, woken: Callable[[], None]) -> None:
        """Tell somebody when there was a report."""
        self._woken = woken

    def moved(self) -> KvMoved:
        return KvMoved()

    def moved_of(self, transfer: TransferId) -> KvMoved | None:
        return None

    def check(self) -> None:
        return

    def close(self) -> None:
        return

    def give(self, order: KvOrder) -> None:
        self._inside(partial(self._carry_out, order))

    def peers(self) -> set[Peer]:
        """Return whom it has anything open with."""
        return {each.order.grant.to for each in self._sends.values()} | {each.source for each in self._receives}

    def lose(self, peer: Peer, why: str) -> None:
        """See a connection end."""
        self._inside(lambda: self._say(PeerDown(PeerRank(peer, 0), why)))

    def push(self) -> None:
        """Post what was computed since."""
        for transfer, send in list(self._sends.items()):
            stop = min(self._oracle.computed.get(transfer.number, 0), send.order.grant.tokens.stop)
            while send.posted < stop and not send.closing:
                first, send.posted = send.posted, min(stop, send.posted + self._world.draw.randint(1, 8))
                send.reading += 1
                read = partial(self._read, transfer, send, range(first, send.posted))
                self._world.later(self._peer, self._world.draw.random() * 0.1, read)
            self._maybe_done(transfer, send)

    # -------------------------------------------------------------- inside

    def _inside(self, act: Callable[[], None]) -> None:
        """Do something at another process of the replica, in order."""
        self._inner_s = max(self._inner_s + 1e-9, self._world.now_s + self._world.draw.random() * 0.02)
        self._world.later(self._peer, self._inner_s - self._world.now_s, act)

    def _say(self, report: Any) -> None:
        self._hear(0, report)
        self._woken()

    def _carry_out(self, order: KvOrder) -> None:
        match order:
            case OpenSend(grant=grant):
                if self._world.life(grant.to) is None:
                    self.lose(grant.to, "nobody answers")
                self._sends[grant.transfer] = _Send(order, grant.tokens.start)
                self.push()
            case OpenReceive(grant=grant):
                self._receives[grant.transfer] = _Receive(order, set(grant.tokens))
                self._say(RankOpened(transfer=grant.transfer, generation=grant.generation, rank=0))
                self._maybe_complete(self._receives[grant.transfer])
            case CloseTransfer(transfer=transfer, generation=generation):
                self._close(transfer, generation)
            case ForgetTransfer(transfer=transfer):
                self._oracle.computed.pop(transfer.number, None)
                self._oracle.blocks.pop(transfer.number, None)

    def _close(self, transfer: TransferId, generation: int) -> None:
        one: _Send | _Receive | None = (self._sends if transfer.source == self._peer else self._receives).get(transfer)
        if one is None or one.order.grant.generation != generation:
            self._say(Drained(transfer=transfer, generation=generation, rank=0))
            return
        one.closing = True
        self._maybe_drained(transfer, one)

    def _maybe_drained(self, transfer: TransferId, one: _Send | _Receive) -> None:
        if one.closing and not (one.reading if isinstance(one, _Send) else one.writing):
            (self._sends if isinstance(one, _Send) else self._receives).pop(transfer, None)
            self._say(Drained(transfer=transfer, generation=one.order.grant.generation, rank=0))

    def _read(self, transfer: TransferId, send: _Send, tokens: range) -> None:
        """Read what a frame holds, at the moment at which a transport does."""
        send.reading -= 1
        grant = send.order.grant
        if not send.closing:
            assert self.scheduler is not None
            if sent_key(transfer.number) not in self.scheduler.loans:
                raise Wrong(f"{transfer} is read from blocks that are not its own")
            size, oracle = self._oracle.block_size, self._oracle
            blocks = oracle.blocks[transfer.number]
            values = [int(oracle.kv[blocks[at // size], at % size]) for at in tokens]
            generation, to, world = grant.generation, grant.to, self._world

            def arrive() -> None:
                life = world.life(to)
                if life is not None:
                    life.rank.arrived(transfer, generation, tokens, values)

            world.frame(PeerRank(self._peer, 0), to, arrive)
        self._maybe_done(transfer, send)
        self._maybe_drained(transfer, send)

    def _maybe_done(self, transfer: TransferId, send: _Send) -> None:
        grant = send.order.grant
        if send.posted >= grant.tokens.stop and not (send.reading or send.said or send.closing):
            send.said = True
            self._say(RankDone(transfer=transfer, generation=grant.generation, rank=0))

    def arrived(self, transfer: TransferId, generation: int, tokens: range, values: list[int]) -> None:
        """Take a frame in, if there is a grant for it."""
        one = self._receives.get(transfer)
        if one is None or one.closing or one.order.grant.generation != generation:
            return
        if self._world.spoils():
            self._say(RankBroken(transfer=transfer, generation=generation, rank=0, ending=Ending.BAD_CHECKSUM))
            return
        one.writing += 1
        self._world.later(
            self._peer, self._world.draw.random() * 0.1, partial(self._write, transfer, one, tokens, values)
        )

    def _write(self, transfer: TransferId, one: _Receive, tokens: range, values: list[int]) -> None:
        one.writing -= 1
        assert self.scheduler is not None
        if transfer not in self.scheduler.loans:
            raise Wrong(f"a block of {transfer} was reused under its writer")
        size, blocks = self._oracle.block_size, one.order.grant.blocks
        for at, value in zip(tokens, values, strict=True):
            self._oracle.kv[blocks[at // size], at % size] = value
        one.missing.difference_update(tokens)
        self._maybe_complete(one)
        self._maybe_drained(transfer, one)

    def _maybe_complete(self, one: _Receive) -> None:
        grant = one.order.grant
        if not one.missing and not one.closing:
            self._say(RankDone(transfer=grant.transfer, generation=grant.generation, rank=0))


class Lines:
    """Lines between desks, which the world carries."""

    def __init__(self, world: World, peer: Peer) -> None:
        self._world = world
        self._peer = peer

    def listen(self, events: object) -> None:
        return

    def open(self, replica: str, address: str) -> bool:
        return True

    def say_to_receiver(self, replica: str, message: FromSender) -> bool:
        self._world.say(self._peer, replica, message, to_sender=False)
        return True

    def say_to_sender(self, replica: str, message: FromReceiver) -> bool:
        self._world.say(self._peer, replica, message, to_sender=True)
        return True

    def target(self, peer: Peer) -> KvTarget | None:
        return cast(KvTarget, SimpleNamespace(layout=LAYOUT))

    def source(self, peer: Peer) -> KvLayout | None:
        return LAYOUT

    def close(self) -> None:
        return


# ------------------------------------------------------------------ its driver


@dataclass(slots=True)
class _Session:
    """What requests of one session with a gateway have in common."""

    live: dict[str, LiveRequest] = field(default_factory=dict)


class Replica:
    """One life of a replica."""

    def __init__(self, world: World, peer: Peer, role: str, *, num_blocks: int, block_size: int) -> None:
        self.world = world
        self.peer = peer
        self.role = role
        draw = world.draw
        config = SchedulerConfig(
            max_model_len=MAX_LENGTH,
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=4,
            max_num_batched_tokens=draw.choice([6, 16, 40]),
            max_queued_requests=16,
        )
        oracle = SendingOracle(num_blocks=num_blocks, block_size=block_size, max_slots=4, max_length=MAX_LENGTH)
        self.engine = Engine(
            Scheduler(config), oracle, clock=lambda: world.now_s, ahead=draw.random() < 0.5, step_timeout_s=1e9
        )
        self.scheduler = self.engine.scheduler
        self.rank = Rank(world, peer, oracle)
        self.rank.scheduler = self.scheduler
        self.rank.wakes(self.wake_desk)
        self.desk = SteppedDesk(
            peer,
            lock=self.engine.lock,
            loans=self.scheduler,
            ranks=self.rank,
            lines=Lines(world, peer),
            vocab_size=VOCABULARY,
            block_size=block_size,
            clock=lambda: world.now_s,
            limits=LIMITS,
            tick_s=TICK_S,
        )
        self._inbox: deque[DeskEvent] = deque()
        self.desk.begin(self._told)
        self.scheduler.attach(self.desk)
        facts = EngineFacts(
            epoch=str(peer.incarnation),
            model="imagined",
            vocab_size=VOCABULARY,
            max_model_len=MAX_LENGTH,
            max_num_seqs=4,
            eos_token_ids=(),
            dtype="none",
            device="none",
            replica=peer.replica,
            role=role,
            block_size=block_size,
            sends_kv=role == "prefill",
            receives_kv=role == "decode",
        )
        self.facts = facts
        self._hand_offs = HandOffs(self.engine, self.desk, facts, max_awaiting=8)
        self.live: dict[str, LiveRequest] = {}
        self._news = cast(News, _Session())
        self._desk_due = self._engine_due = False
        self._tick()

    @property
    def at_rest(self) -> bool:
        """Whether nothing is left here: no request, no transfer, no block that anybody but the cache has."""
        return (
            not self.live
            and not self.engine.has_work
            and self.desk.load.is_idle
            and self.scheduler.pool.available == self.scheduler.pool.num_blocks
        )

    # -------------------------------------------------------------- what wakes it

    def wake_desk(self) -> None:
        """Let the desk's thread run soon."""
        if not self._desk_due:
            self._desk_due = True
            self.world.later(self.peer, self.world.draw.random() * 0.02, self._turn_desk)

    def _wake_engine(self, after_s: float) -> None:
        if not self._engine_due:
            self._engine_due = True
            self.world.later(self.peer, after_s, self._turn_engine)

    def _tick(self) -> None:
        self.wake_desk()
        self._end_overdue()
        self._wake_engine(0.0)
        self._report()
        self.world.later(self.peer, TICK_S, self._tick)

    def _turn_desk(self) -> None:
        self._desk_due = False
        self.desk.turn()
        if self._inbox:
            self._wake_engine(self.world.draw.random() * 0.02)

    def _told(self, event: DeskEvent) -> None:
        self._inbox.append(event)

    # -------------------------------------------------------------- what a gateway says

    def submit(
        self, key: str, request: EngineRequest, *, timeout_s: float, send_to: SendTo | None, ticket: str
    ) -> None:
        """Take a request."""
        live = LiveRequest(news=self._news, key=0, engine_id=key, deadline_s=self.world.now_s + timeout_s)
        request = replace(request, request_id=key)
        self.live[key] = live
        try:
            if send_to is not None:
                self._hand_offs.send(live, request, send_to)
            elif ticket:
                self._hand_offs.hold(live, request, ticket)
            else:
                self._hand_offs.begin(live, request)
        except SlipstreamError as error:
            del self.live[key]
            self.world.news(self.peer, Refused(key, error))
        self._stirred()

    def abort(self, key: str) -> None:
        """Let a request go."""
        if key in self.live:
            self._drop(key)
            self._stirred()

    def go_on(self, key: str) -> None:
        """Compute a request here that waits."""
        live = self.live.get(key)
        if live is not None:
            try:
                self._hand_offs.go_on(live)
            except SlipstreamError as error:
                self._drop(key)
                self.world.news(self.peer, Refused(key, error))
            self._stirred()

    def leave(self) -> None:
        """Let all requests go: the session is lost."""
        for key in list(self.live):
            self._drop(key)
        self._stirred()

    def _stirred(self) -> None:
        self.wake_desk()
        self._wake_engine(self.world.draw.random() * 0.02)

    def _drop(self, key: str) -> None:
        self._forget(key)
        self.engine.abort(key)

    def _forget(self, key: str) -> None:
        self._hand_offs.leave(self.live.pop(key))

    def _end_overdue(self) -> None:
        for key, live in list(self.live.items()):
            if self.world.now_s >= live.deadline_s:
                self._drop(key)
                self.world.news(self.peer, Refused(key, DeadlineExceeded("the request did not end within its time")))

    # -------------------------------------------------------------- its engine's thread

    def _turn_engine(self) -> None:
        self._engine_due = False
        while self._inbox:
            match self._inbox.popleft():
                case Arrived() as arrived:
                    self._arrived(arrived)
                case SendEnded(request_id=key, report=report) as ended:
                    live = self.live.get(key)
                    if live is not None and self._hand_offs.is_over(live, ended):
                        self._drop(key)
                        self.world.news(self.peer, Handed(key, report))
                case DeskChanged():
                    # Its load is looked at after every step, and by whoever asks.
                    continue
                case other:
                    raise Wrong(f"{self.peer}: {other}")
        if not self.engine.has_work:
            return
        self._note()
        self.rank.push()
        self.scheduler.check_integrity()
        self.wake_desk()
        if self.engine.has_work:
            self._wake_engine(0.1 if self.engine.is_stalled else 0.005 + self.world.draw.random() * 0.1)

    def _arrived(self, arrived: Arrived) -> None:
        live = self._hand_offs.find(arrived)
        if live is None:
            self._hand_offs.drop(arrived)
            return
        try:
            self._hand_offs.arrived(live, arrived)
        except SlipstreamError as error:
            self._drop(live.engine_id)
            self.world.news(self.peer, Refused(live.engine_id, error))

    def _note(self) -> None:
        outputs = self.engine.step()
        for sequence, token_id in zip(outputs.sequences, outputs.token_ids, strict=True):
            live = self.live.get(sequence.request_id)
            if live is not None:
                self.world.news(self.peer, Token(sequence.request_id, token_id))
                if live.sent_on:
                    live.last = token_id, None
        for sequence in outputs.finished:
            live = self.live.get(sequence.request_id)
            if live is not None and not (live.sent_on and self._hand_offs.is_handed(live, sequence)):
                self._end_sample(live, sequence)

    def _end_sample(self, live: LiveRequest, sequence: Sequence) -> None:
        assert sequence.state is SequenceState.FINISHED and sequence.finish_reason is not None
        self.world.news(self.peer, SampleEnded(live.engine_id, sequence.finish_reason.value))
        self._forget(live.engine_id)

    def _report(self) -> None:
        load, desk = self.scheduler.load, self.desk.load
        changes = self.scheduler.pool.take_changes()
        report = EngineLoadReport(
            running=load.running,
            waiting=load.waiting,
            queue_room=self.scheduler.queue_room,
            blocks_total=load.blocks_total,
            blocks_available=load.blocks_available,
            preemptions=load.preemptions,
            prefix_hits=0,
            prefix_misses=0,
            draining=False,
            queued_tokens=load.queued_tokens,
            prefill_tokens_per_s=self.engine.rates.prefill_tokens_per_s,
            token_s=self.engine.rates.token_s,
            awaiting=desk.awaiting,
        )
        short = BlockChanges(
            stored=tuple(digest[:16] for digest in changes.stored),
            removed=tuple(digest[:16] for digest in changes.removed),
            reset=changes.reset,
        )
        self.world.news(self.peer, Busy(report, short))
