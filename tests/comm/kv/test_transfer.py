"""Both ends of a transfer, event by event: each class of failure that other systems had, by its number."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest

from slipstream.comm.kv.endings import Endings
from slipstream.comm.kv.parked import ParkedStore
from slipstream.comm.kv.receiver import KvReceiver, Loan
from slipstream.comm.kv.sender import KvSender
from slipstream.comm.kv.transfer import (
    Acknowledged,
    Close,
    Committed,
    Deferred,
    Drained,
    End,
    Ended,
    Ending,
    Finish,
    Granted,
    Heartbeat,
    OpenReceiving,
    OpenSending,
    Peer,
    RankBroken,
    RankDone,
    RankOpened,
    Reserve,
    Tell,
    TransferId,
    TransferLimits,
)

LIMITS = TransferLimits(
    lease_s=10.0, heartbeat_s=2.0, answer_timeout_s=5.0, max_wait_s=30.0, max_tries=1, max_parked_blocks=10
)
PREFILL, DECODE = Peer("prefill-0", 1), Peer("decode-0", 1)
RANKS = 2


@dataclass
class Blocks:
    """A lender that knows numbers."""

    free: int = 8
    size: int = 4
    total: int = 8
    taken: dict[TransferId, int] = field(default_factory=dict)

    def is_expected(self, reserve: Reserve) -> bool:
        return True

    def fits(self, reserve: Reserve) -> bool:
        return -(-reserve.tokens // self.size) <= self.total

    def take(self, reserve: Reserve) -> Loan | None:
        count = -(-reserve.tokens // self.size)
        if count > self.free:
            return None
        self.free -= count
        self.taken[reserve.transfer] = count
        return Loan(blocks=tuple(range(count)))

    def release(self, transfer: TransferId) -> None:
        self.free += self.taken.pop(transfer)


@dataclass
class Pair:
    """A sender and a receiver; messages go at once, unless the test takes them."""

    limits: TransferLimits = LIMITS
    blocks: Blocks = field(default_factory=Blocks)
    released: list[TransferId] = field(default_factory=list)
    now_s: float = 100.0
    deaf: bool = False
    """Whether messages get lost."""
    ended: list[tuple[str, Ending]] = field(default_factory=list)
    done: list[object] = field(default_factory=list)
    """What the machines asked for, but for messages and endings."""
    prefill: Peer = PREFILL
    decode: Peer = DECODE

    def __post_init__(self) -> None:
        self.sender = KvSender(self.prefill, ranks=RANKS, release=self.released.append, limits=self.limits)
        self.receiver = KvReceiver(ranks=RANKS, lender=self.blocks, limits=self.limits)

    def begin(self, tokens: int = 10, *, timeout_s: float = 1000.0) -> TransferId:
        transfer = self.sender.begin(self.now_s, "decode-0", tokens=tokens, blocks=3, timeout_s=timeout_s)
        assert transfer is not None
        self.settle()
        return transfer

    def granted(self, tokens: int = 10) -> TransferId:
        """Begin a transfer and let all ranks open it."""
        transfer = self.begin(tokens)
        self.reports(RankOpened, transfer)
        return transfer

    def sent(self) -> TransferId:
        """Have everything sent, and nothing of it applied."""
        transfer = self.granted()
        self.sender.prompt_done(self.now_s, transfer, b"go on")
        for rank in range(RANKS):
            self.sender.report(self.now_s, RankDone(transfer=transfer, generation=1, rank=rank))
        self.settle()
        return transfer

    def committed(self) -> TransferId:
        transfer = self.sent()
        self.reports(RankDone, transfer)
        return transfer

    def reports(
        self, kind: type[RankOpened] | type[RankDone] | type[Drained], transfer: TransferId, *, at: str = "receiver"
    ) -> None:
        for rank in range(RANKS):
            report = kind(transfer=transfer, generation=1, rank=rank)
            if at == "receiver":
                self.receiver.report(report)
            else:
                self.sender.report(self.now_s, report)
        self.settle()

    def settle(self) -> None:
        """Carry out what was asked for, until nothing is."""
        while (actions := self.sender.take_actions()) or (theirs := self.receiver.take_actions()):
            for action in actions or theirs:
                name = "sender" if actions else "receiver"
                match action:
                    case Tell(replica=replica, message=message):
                        if self.deaf or replica not in (self.prefill.replica, self.decode.replica):
                            continue
                        if actions:
                            self.receiver.hear(self.now_s, message, self.prefill)  # type: ignore[arg-type]
                        else:
                            self.sender.hear(self.now_s, message, self.decode)  # type: ignore[arg-type]
                    case Ended(ending=ending):
                        self.ended.append((name, ending))
                    case _:
                        self.done.append(action)

    def wait(self, seconds: float, *, ends: Iterable[str] = ("sender", "receiver")) -> None:
        """Let time pass in steps in which nobody's machine is asked for anything else."""
        for _ in range(math.ceil(seconds)):
            self.now_s += 1.0
            if "sender" in ends:
                self.sender.tick(self.now_s)
            if "receiver" in ends:
                self.receiver.tick(self.now_s)
            self.settle()

    def hear(self, message: Reserve | Finish | End | Heartbeat, peer: Peer = PREFILL) -> list[object]:
        """Say something to the receiver, and return what it answers."""
        self.receiver.hear(self.now_s, message, peer)
        return [action.message for action in self.receiver.take_actions() if isinstance(action, Tell)]

    def check_nothing_left(self) -> None:
        assert len(self.receiver) == 0 and self.blocks.free == self.blocks.total
        assert len(self.sender) == 0 and self.sender.parked_blocks == 0


def reserve(number: int = 1, *, generation: int = 1, tokens: int = 10, incarnation: int = 1, **more: object) -> Reserve:
    transfer = TransferId("prefill-0", incarnation, number)
    ask = Reserve(transfer=transfer, generation=generation, tokens=tokens, timeout_s=1000.0)
    return replace(ask, **more)  # type: ignore[arg-type] # fields by name


def end(ask: Reserve, ending: Ending) -> list[End]:
    return [End(transfer=ask.transfer, generation=ask.generation, ending=ending)]


def test_the_whole_way() -> None:
    pair = Pair()
    transfer = pair.begin()
    assert pair.done == [OpenReceiving(transfer=transfer, generation=1, tokens=range(10), blocks=(0, 1, 2))]
    pair.reports(RankOpened, transfer)
    assert pair.done[1] == OpenSending(transfer=transfer, generation=1, to=DECODE, tokens=range(10), blocks=(0, 1, 2))
    pair.sender.prompt_done(pair.now_s, transfer, b"go on")
    pair.reports(RankDone, transfer, at="sender")
    assert pair.ended == []
    pair.reports(RankDone, transfer)
    assert pair.ended == [("receiver", Ending.COMMITTED), ("sender", Ending.COMMITTED)]
    assert Committed(transfer=transfer, blocks=(0, 1, 2), hand_off=b"go on") in pair.done
    # The sender's ranks may still read: its blocks go when they say that they do not.
    assert pair.released == []
    pair.reports(Drained, transfer, at="sender")
    assert pair.released == [transfer]
    # And the receiver's when the engine has taken them over.
    assert pair.blocks.free == 5
    pair.receiver.let_go(transfer)
    pair.check_nothing_left()


# ------------------------------------------------------------------ 1: the receiver does not take it


def test_class_1_a_receiver_that_never_answers() -> None:
    pair = Pair(deaf=True)
    transfer = pair.begin()
    pair.wait(4, ends=["sender"])
    assert pair.ended == []
    pair.wait(1, ends=["sender"])
    assert pair.ended == [("sender", Ending.NO_ANSWER)] and pair.released == [transfer]


@pytest.mark.parametrize(
    ("tokens", "limits", "ending"),
    [
        (33, LIMITS, Ending.NEVER_FITS),
        (10, replace(LIMITS, max_tokens=9), Ending.NEVER_FITS),
        (10, replace(LIMITS, max_transfers=1), Ending.TOO_MANY),
    ],
)
def test_class_1_a_receiver_that_refuses(tokens: int, limits: TransferLimits, ending: Ending) -> None:
    pair = Pair()
    pair.receiver = KvReceiver(ranks=RANKS, lender=pair.blocks, limits=limits)
    pair.hear(reserve(9, tokens=1))
    transfer = pair.begin(tokens)
    assert pair.ended == [("sender", ending)] and pair.released == [transfer]


def test_class_1_a_receiver_that_dies_after_granting() -> None:
    pair = Pair()
    transfer = pair.granted()
    pair.wait(10, ends=["sender"])
    assert pair.ended == [("sender", Ending.LEASE_EXPIRED), ("receiver", Ending.LEASE_EXPIRED)]
    assert pair.released == []
    pair.reports(Drained, transfer, at="sender")
    assert pair.released == [transfer]


# ------------------------------------------------------------------ 2, 3: the sender dies, leases run out


def test_class_2_a_sender_that_dies() -> None:
    pair = Pair()
    transfer = pair.granted()
    pair.deaf = True
    pair.wait(9, ends=["receiver"])
    assert pair.ended == [] and pair.blocks.free == 5
    pair.wait(1, ends=["receiver"])
    assert pair.ended == [("receiver", Ending.LEASE_EXPIRED)]
    assert pair.blocks.free == 5, "a rank may be in the middle of a frame"
    pair.reports(Drained, transfer)
    assert pair.blocks.free == 8


def test_class_2_a_connection_that_breaks() -> None:
    pair = Pair()
    transfer = pair.granted()
    pair.receiver.peer_lost(Peer("prefill-0", 2))
    pair.receiver.peer_lost(Peer("prefill-1", 1))
    pair.sender.peer_lost(pair.now_s, Peer("decode-0", 2))
    pair.settle()
    assert pair.ended == []
    pair.receiver.report(RankBroken(transfer=transfer, generation=1, rank=0, ending=Ending.PEER_LOST))
    pair.receiver.peer_lost(PREFILL)
    pair.settle()
    assert pair.ended == [("receiver", Ending.PEER_LOST), ("sender", Ending.PEER_LOST)]


def test_class_3_heartbeats_alone_keep_a_transfer() -> None:
    """No step is taken, no frame sent: the model may compute as long as it likes, within the request's deadline."""
    pair = Pair()
    pair.granted()
    pair.wait(500)
    assert pair.ended == []
    pair.wait(500)
    assert set(pair.ended) == {("sender", Ending.DEADLINE), ("receiver", Ending.DEADLINE)}


def test_class_3_a_lease_that_runs_out_while_frames_come() -> None:
    """Nothing is committed of it any more, whatever arrives, and its blocks stay until the ranks have closed."""
    pair = Pair()
    transfer = pair.sent()
    pair.deaf = True
    pair.wait(10, ends=["receiver"])
    pair.reports(RankDone, transfer)
    pair.hear(Finish(transfer=transfer, generation=1, hand_off=b"go on"))
    assert pair.ended == [("receiver", Ending.LEASE_EXPIRED)]
    assert not any(isinstance(action, Committed) for action in pair.done)
    assert pair.blocks.free == 5
    pair.reports(Drained, transfer)
    assert pair.blocks.free == 8


# ------------------------------------------------------------------ 4, 6: aborts


@pytest.mark.parametrize("state", ["begin", "granted", "sent"])
@pytest.mark.parametrize("who", ["sender", "receiver", "both"])
def test_class_4_abort_in_any_state_keeps_blocks_until_nobody_writes(who: str, state: str) -> None:
    pair = Pair()
    transfer: TransferId = getattr(pair, state)()
    if who != "receiver":
        pair.sender.cancel(transfer)
    if who != "sender":
        pair.receiver.cancel(transfer)
    pair.settle()
    assert sorted(pair.ended) == [("receiver", Ending.CANCELLED), ("sender", Ending.CANCELLED)]
    assert Close(transfer=transfer, generation=1) in pair.done
    assert pair.blocks.free == 5, "a rank may be writing"
    pair.receiver.report(Drained(transfer=transfer, generation=1, rank=0))
    assert pair.blocks.free == 5
    pair.reports(Drained, transfer)
    assert pair.blocks.free == 8
    pair.reports(Drained, transfer, at="sender")
    assert pair.released == [transfer]
    pair.check_nothing_left()


def test_class_6_abort_after_the_end_does_nothing() -> None:
    pair = Pair()
    transfer = pair.committed()
    pair.reports(Drained, transfer, at="sender")
    ended = list(pair.ended)
    for _ in range(2):
        pair.sender.cancel(transfer)
        pair.receiver.cancel(transfer)
        pair.settle()
    assert pair.ended == ended and pair.blocks.free == 8, "the engine let go of what nobody wants"
    pair.check_nothing_left()


def test_class_6_an_abort_that_crosses_the_commitment() -> None:
    """The receiver's word counts: what is committed there stays so."""
    pair = Pair()
    transfer = pair.sent()
    pair.deaf = True
    pair.reports(RankDone, transfer)
    pair.deaf = False
    pair.sender.cancel(transfer)
    pair.settle()
    assert pair.ended == [("receiver", Ending.COMMITTED), ("sender", Ending.CANCELLED)]
    assert pair.blocks.free == 5
    pair.receiver.let_go(transfer)
    assert pair.blocks.free == 8


def test_class_6_an_abort_that_overtakes_its_reservation() -> None:
    pair = Pair()
    ask = reserve()
    assert pair.hear(End(transfer=ask.transfer, generation=1, ending=Ending.CANCELLED)) == []
    assert pair.hear(ask) == end(ask, Ending.CANCELLED)
    assert len(pair.receiver) == 0 and pair.blocks.free == 8


# ------------------------------------------------------------------ 5: adversarial references


def test_class_5_what_nobody_began() -> None:
    pair = Pair()
    ask = reserve(77)
    pair.hear(reserve(1))
    assert pair.hear(Finish(transfer=ask.transfer, generation=1, hand_off=b"")) == end(ask, Ending.UNKNOWN)
    assert pair.hear(Heartbeat(alive=((ask.transfer, 1),))) == end(ask, Ending.UNKNOWN)
    pair.sender.hear(pair.now_s, Granted(transfer=ask.transfer, generation=1, blocks=(), first_token=0), DECODE)
    assert pair.sender.take_actions() == [Tell(replica="decode-0", message=end(ask, Ending.UNKNOWN)[0])]
    pair.sender.hear(pair.now_s, Acknowledged(transfer=ask.transfer, generation=1), DECODE)
    assert pair.sender.take_actions() == []


def test_class_5_a_reference_is_used_once() -> None:
    pair = Pair()
    transfer = pair.committed()
    pair.receiver.let_go(transfer)
    for generation in (1, 2, 50):
        ask = reserve(transfer.number, generation=generation)
        assert pair.hear(ask) == [Acknowledged(transfer=transfer, generation=generation)]
    assert pair.blocks.free == 8


def test_class_5_a_reference_that_was_forgotten_stays_used() -> None:
    pair = Pair()
    pair.receiver = KvReceiver(ranks=RANKS, lender=pair.blocks, limits=replace(LIMITS, max_remembered=4))
    first = pair.committed()
    pair.receiver.let_go(first)
    for number in range(10, 16):
        pair.hear(End(transfer=reserve(number).transfer, generation=1, ending=Ending.CANCELLED))
    ask = reserve(first.number)
    assert pair.hear(ask) == end(ask, Ending.CONSUMED)
    # Others of that life may still begin.
    pair.hear(reserve(20))
    assert len(pair.receiver) == 1


@pytest.mark.parametrize("state", ["granted", "sent", "committed"])
def test_class_5_references_of_others(state: str) -> None:
    """Another replica, or another life of the same, can neither end nor finish nor renew a transfer."""
    pair = Pair()
    transfer: TransferId = getattr(pair, state)()
    before = (len(pair.receiver), pair.blocks.free, list(pair.ended))
    for message in (
        End(transfer=transfer, generation=1, ending=Ending.CANCELLED),
        Finish(transfer=transfer, generation=1, hand_off=b"mine"),
        Reserve(transfer=transfer, generation=2, tokens=1, timeout_s=1.0),
        Heartbeat(alive=((transfer, 1),)),
    ):
        for peer in (Peer("prefill-9", 1), Peer("prefill-0", 0)):
            for answer in pair.hear(message, peer):
                assert isinstance(answer, End) and answer.ending in (Ending.BAD_REFERENCE, Ending.STALE)
    assert (len(pair.receiver), pair.blocks.free, pair.ended) == before
    for answer in (
        Granted(transfer=transfer, generation=1, blocks=(), first_token=0),
        End(transfer=transfer, generation=1, ending=Ending.CANCELLED),
        Acknowledged(transfer=transfer, generation=1),
    ):
        pair.sender.hear(pair.now_s, answer, Peer("decode-9", 1))
        pair.settle()
    assert pair.ended == before[2]


@pytest.mark.parametrize(
    "ask",
    [
        reserve(tokens=0),
        reserve(tokens=-5),
        reserve(generation=0),
        reserve(tokens=1 << 40),
        reserve(timeout_s=math.nan),
        reserve(timeout_s=math.inf),
        reserve(timeout_s=-1.0),
    ],
)
def test_class_5_reservations_that_cannot_be_hold_no_blocks(ask: Reserve) -> None:
    pair = Pair()
    pair.hear(ask)
    pair.receiver.tick(pair.now_s)
    for rank in range(RANKS):
        pair.receiver.report(Drained(transfer=ask.transfer, generation=ask.generation, rank=rank))
    assert len(pair.receiver) == 0 and pair.blocks.free == 8


def test_class_5_a_grant_that_cannot_be_ends_the_transfer() -> None:
    pair = Pair(deaf=True)
    transfer = pair.begin()
    pair.sender.hear(pair.now_s, Granted(transfer=transfer, generation=1, blocks=(1,), first_token=11), DECODE)
    pair.settle()
    assert pair.ended == [("sender", Ending.BAD_REFERENCE)] and pair.released == [transfer]


def test_class_5_a_hand_off_is_bounded() -> None:
    pair = Pair(limits=replace(LIMITS, max_hand_off_bytes=4))
    pair.sent()
    assert pair.ended == [("receiver", Ending.BAD_REFERENCE), ("sender", Ending.BAD_REFERENCE)]


# ------------------------------------------------------------------ 8, 9: names and lives


def test_class_8_two_senders_with_the_same_numbers() -> None:
    pair = Pair()
    other = Peer("prefill-1", 1)
    theirs = replace(reserve(1), transfer=TransferId("prefill-1", 1, 1))
    mine = pair.granted()
    pair.hear(theirs, other)
    assert (mine.number, mine.incarnation) == (theirs.transfer.number, theirs.transfer.incarnation)
    assert len(pair.receiver) == 2 and pair.blocks.free == 2
    pair.hear(End(transfer=theirs.transfer, generation=1, ending=Ending.CANCELLED), other)
    assert pair.ended == []
    pair.reports(RankDone, theirs.transfer)
    assert not any(isinstance(action, Committed) for action in pair.done)


def test_class_9_a_sender_that_restarts() -> None:
    pair = Pair()
    transfer = pair.granted()
    again = Peer("prefill-0", 2)
    pair.hear(reserve(1, incarnation=2), again)
    pair.settle()
    pair.reports(Drained, transfer)
    assert len(pair.receiver) == 1, "the new life's; the old one's is over"
    # What the old life said late is not listened to.
    assert pair.hear(reserve(2)) == end(reserve(2), Ending.STALE)
    assert pair.hear(Finish(transfer=transfer, generation=1, hand_off=b"")) == []


def test_class_9_a_receiver_that_restarts() -> None:
    pair = Pair()
    transfer = pair.granted()
    again = Peer("decode-0", 2)
    pair.sender.hear(pair.now_s, Heartbeat(alive=()), again)
    pair.settle()
    assert pair.ended[0] == ("sender", Ending.PEER_RESTARTED)
    pair.sender.hear(pair.now_s, Acknowledged(transfer=transfer, generation=1), DECODE)
    pair.reports(Drained, transfer, at="sender")
    assert pair.released == [transfer] and pair.ended[0] == ("sender", Ending.PEER_RESTARTED)


def test_class_9_the_next_generation_goes_to_the_next_life() -> None:
    """The KV is still there: it is sent again, once no rank sends the old generation any more."""
    pair = Pair(limits=replace(LIMITS, max_tries=2))
    transfer = pair.sent()
    pair.deaf = True
    pair.decode = Peer("decode-0", 2)
    pair.blocks = Blocks()
    pair.receiver = KvReceiver(ranks=RANKS, lender=pair.blocks, limits=pair.limits)
    pair.sender.hear(pair.now_s, Heartbeat(alive=()), pair.decode)
    pair.deaf = False
    pair.settle()
    assert pair.ended == [] and len(pair.receiver) == 0
    pair.reports(Drained, transfer, at="sender")
    assert len(pair.receiver) == 1
    for report in (RankOpened, RankDone):
        for rank in range(RANKS):
            pair.receiver.report(report(transfer=transfer, generation=1, rank=rank))
            pair.receiver.report(report(transfer=transfer, generation=2, rank=rank))
    pair.settle()
    opened = [action for action in pair.done if isinstance(action, OpenSending)]
    assert [(each.generation, each.to) for each in opened] == [(1, DECODE), (2, pair.decode)]
    for rank in range(RANKS):
        pair.sender.report(pair.now_s, RankDone(transfer=transfer, generation=2, rank=rank))
    pair.settle()
    assert pair.ended == [("receiver", Ending.COMMITTED), ("sender", Ending.COMMITTED)]


# ------------------------------------------------------------------ 12: no room


def test_class_12_who_waits_is_served_in_order_when_there_is_room() -> None:
    pair = Pair()
    pair.hear(reserve(100, tokens=30))
    asks = [reserve(101, tokens=16), reserve(102, tokens=20), reserve(103, tokens=1)]
    for ask in asks:
        assert pair.hear(ask) == [Deferred(transfer=ask.transfer, generation=1)]
    first = reserve(100).transfer
    pair.hear(End(transfer=first, generation=1, ending=Ending.CANCELLED))
    pair.reports(Drained, first)
    pair.receiver.tick(pair.now_s)
    opened = [action.transfer.number for action in pair.receiver.take_actions() if isinstance(action, OpenReceiving)]
    assert opened == [101], "a small one does not overtake a large one for ever"


def test_class_12_waiting_is_bounded_in_number_and_time() -> None:
    pair = Pair(limits=replace(LIMITS, max_waiting=2))
    pair.hear(reserve(100, tokens=32))
    pair.hear(reserve(101))
    pair.hear(reserve(102))
    assert pair.hear(reserve(103)) == end(reserve(103), Ending.NO_ROOM)
    alive = Heartbeat(alive=tuple((reserve(number).transfer, 1) for number in (100, 101, 102)))
    for _ in range(30):
        pair.now_s += 1.0
        pair.hear(alive)
        pair.receiver.tick(pair.now_s)
    ended = [action for action in pair.receiver.take_actions() if isinstance(action, Ended)]
    assert [(each.transfer.number, each.ending) for each in ended] == [(101, Ending.NO_ROOM), (102, Ending.NO_ROOM)]


def test_class_12_what_waits_is_kept_within_bounds() -> None:
    pair = Pair()
    pair.blocks.free = 0
    waiting = [pair.begin() for _ in range(3)]
    assert pair.sender.parked_blocks == 9
    refused = pair.begin()
    assert pair.ended == [("sender", Ending.PARKED_FULL), ("receiver", Ending.PARKED_FULL)]
    assert pair.released == [refused]
    # The receiver's heartbeats keep it, also without room; and then it is granted.
    pair.wait(20)
    assert len(pair.ended) == 2
    pair.blocks.free = 3
    pair.wait(1)
    pair.reports(RankOpened, waiting[0])
    assert pair.sender.parked_blocks == 6
    # Of a receiver that says nothing any more nothing is kept.
    pair.deaf = True
    pair.wait(10, ends=["sender"])
    assert pair.sender.parked_blocks == 0 and pair.released == [refused, *waiting[1:]]


def test_a_parked_store_counts() -> None:
    store = ParkedStore(max_blocks=5, lease_s=2.0)
    one, two, three = (reserve(number).transfer for number in range(3))
    assert store.add(0.0, one, 3) and store.add(0.0, two, 2) and not store.add(0.0, three, 1)
    store.renew(1.0, one)
    store.renew(1.0, three)
    assert store.expired(2.0) == [two] and store.expired(1.9) == []
    store.remove(two)
    store.remove(two)
    assert store.blocks == 3 and len(store) == 1 and one in store and store.add(2.0, three, 2)


# ------------------------------------------------------------------ 15, 16: deliveries and hung peers


def test_class_15_sent_is_not_delivered() -> None:
    pair = Pair()
    transfer = pair.sent()
    pair.receiver.report(RankDone(transfer=transfer, generation=1, rank=0))
    pair.settle()
    pair.wait(100)
    assert pair.ended == [] and not any(isinstance(action, Committed) for action in pair.done)
    pair.receiver.report(RankDone(transfer=transfer, generation=1, rank=1))
    pair.settle()
    assert pair.ended == [("receiver", Ending.COMMITTED), ("sender", Ending.COMMITTED)]


def test_class_15_applied_is_not_finished() -> None:
    """Every byte is there, but what to go on with is not: a prompt's last token may still be computed."""
    pair = Pair()
    transfer = pair.granted()
    pair.reports(RankDone, transfer)
    pair.wait(100)
    assert pair.ended == []


def test_class_15_a_bad_checksum_ends_it() -> None:
    pair = Pair()
    transfer = pair.sent()
    pair.receiver.report(RankBroken(transfer=transfer, generation=1, rank=1, ending=Ending.BAD_CHECKSUM))
    pair.reports(RankDone, transfer)
    assert pair.ended == [("receiver", Ending.BAD_CHECKSUM), ("sender", Ending.BAD_CHECKSUM)]
    assert not any(isinstance(action, Committed) for action in pair.done)


def test_class_15_an_acknowledgement_that_is_lost_is_said_again() -> None:
    pair = Pair()
    transfer = pair.sent()
    pair.deaf = True
    pair.reports(RankDone, transfer)
    assert pair.ended == [("receiver", Ending.COMMITTED)]
    pair.receiver.let_go(transfer)
    pair.deaf = False
    pair.wait(1, ends=["sender"])
    assert pair.ended[1:] == [("sender", Ending.COMMITTED)]


def test_class_16_a_receiver_that_hangs_after_everything_was_sent() -> None:
    """It may have committed: the sender does not claim otherwise."""
    pair = Pair()
    transfer = pair.sent()
    pair.deaf = True
    pair.wait(10, ends=["sender"])
    assert pair.ended == [("sender", Ending.UNACKNOWLEDGED)]
    pair.reports(Drained, transfer, at="sender")
    assert pair.released == [transfer]


@pytest.mark.parametrize("state", ["begin", "granted", "sent"])
def test_class_16_everything_ends_at_the_deadline(state: str) -> None:
    pair = Pair(limits=replace(LIMITS, lease_s=1e5, answer_timeout_s=1e5))
    transfer: TransferId = getattr(pair, state)()
    pair.deaf = True
    pair.wait(1000)
    assert pair.ended == [("sender", Ending.DEADLINE), ("receiver", Ending.DEADLINE)]
    pair.reports(Drained, transfer)
    pair.reports(Drained, transfer, at="sender")
    pair.check_nothing_left()


# ------------------------------------------------------------------ memory of what is over


def test_endings_are_remembered_within_bounds() -> None:
    endings = Endings(max_remembered=3, max_peers=1)
    assert endings.why_not(TransferId("a", 1, 1), 1) is Ending.STALE, "nobody was met"
    assert endings.meet(Peer("a", 2)) is None and endings.meet(Peer("a", 1)) is Ending.STALE
    assert endings.meet(Peer("b", 1)) is Ending.TOO_MANY
    ids = [TransferId("a", 2, number) for number in range(6)]
    assert endings.why_not(ids[0], 1) is None
    for transfer in ids[:3]:
        endings.put(transfer, 1, Ending.PEER_LOST)
    assert endings.why_not(ids[0], 1) is Ending.PEER_LOST and endings.why_not(ids[0], 2) is None
    endings.put(ids[3], 1, Ending.COMMITTED)
    endings.put(ids[3], 2, Ending.PEER_LOST)
    assert endings.why_not(ids[3], 3) is Ending.COMMITTED, "a commitment is final"
    assert endings.why_not(ids[0], 2) is Ending.CONSUMED, "forgotten, and so used"
    assert endings.meet(Peer("a", 3)) is None
    assert endings.why_not(ids[3], 3) is Ending.STALE and endings.why_not(TransferId("a", 3, 0), 1) is None
    endings.forget("a")
    assert endings.meet(Peer("b", 1)) is None


def test_limits_hold_together() -> None:
    with pytest.raises(ValueError, match="at least two heartbeats"):
        TransferLimits(lease_s=3.0, heartbeat_s=2.0)
