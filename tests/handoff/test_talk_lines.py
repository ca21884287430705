"""Lines between drivers: whose word counts, where ranks may be reached, and what is given up."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from slipstream.comm.errors import KvMismatch
from slipstream.comm.kv.layout import KvOffer
from slipstream.comm.kv.transfer import FromReceiver, FromSender, Heartbeat, Peer
from slipstream.placement.kv_routes import KvLayout
from slipstream.runtime.handoff.rank_orders import RankEnd
from slipstream.runtime.handoff.talk_lines import TalkLines
from slipstream.runtime.rpc.kv_in_process import InProcessKvTalker
from slipstream.runtime.rpc.kv_talk import KvFacts

LAYOUT = KvLayout(layers=2, kv_heads=2, block_size=4)
BEAT = Heartbeat(alive=())


@dataclass
class Heard:
    """Notes what a desk would be told."""

    senders: list[tuple[FromSender, Peer]] = field(default_factory=list)
    receivers: list[tuple[FromReceiver, Peer]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)

    def heard_sender(self, message: FromSender, peer: Peer) -> None:
        self.senders.append((message, peer))

    def heard_receiver(self, message: FromReceiver, peer: Peer) -> None:
        self.receivers.append((message, peer))

    def receiver_refused(self, replica: str) -> None:
        self.refused.append(replica)

    def sender_gone(self, replica: str) -> None:
        self.gone.append(replica)


def facts(replica: str, incarnation: int = 1, *, host: str = "here", **offer: Any) -> KvFacts:
    says: dict[str, Any] = {"model": "m", "dtype": "float32", "head_dim": 4, **offer}
    return KvFacts(
        replica=replica,
        incarnation=incarnation,
        layout=LAYOUT,
        ends=({"tcp": f"{replica}:1", "shm": f"/{replica}"},),
        host_id=host,
        offer=KvOffer(replica=replica, incarnation=incarnation, rank=0, layout=LAYOUT, **says),
    )


def lines_of(
    talker: InProcessKvTalker, theirs: KvFacts, kinds: tuple[str, ...] = ("shm", "tcp")
) -> tuple[TalkLines, Heard]:
    lines, heard = TalkLines(theirs, talker, kinds=kinds), Heard()
    lines.listen(heard)
    return lines, heard


def test_words_reach_the_other_end_with_who_said_them() -> None:
    talker = InProcessKvTalker()
    sender, at_sender = lines_of(talker, facts("p", 5))
    receiver, at_receiver = lines_of(talker, facts("d", 7))
    talker.serve("there", receiver)
    assert not sender.say_to_receiver("d", BEAT) and not receiver.say_to_sender("p", BEAT)
    assert sender.open("d", "there") and sender.open("d", "there")
    assert sender.say_to_receiver("d", BEAT) and receiver.say_to_sender("p", BEAT)
    assert at_receiver.senders == [(BEAT, Peer("p", 5))] and at_sender.receivers == [(BEAT, Peer("d", 7))]
    assert receiver.source(Peer("p", 5)) == LAYOUT and receiver.source(Peer("p", 4)) is None
    target = sender.target(Peer("d", 7))
    assert target is not None and target.ends == ((RankEnd("shm", "/d"), RankEnd("tcp", "d:1")),)
    assert sender.target(Peer("d", 6)) is None
    sender.close()
    assert not sender.say_to_receiver("d", BEAT) and not receiver.say_to_sender("p", BEAT)
    assert not sender.open("d", "there"), "it is closed"


def test_shared_memory_is_for_one_host() -> None:
    talker = InProcessKvTalker()
    sender, _ = lines_of(talker, facts("p"))
    only, at_only = lines_of(talker, facts("q"), kinds=("shm",))
    receiver, _ = lines_of(talker, facts("d", host="elsewhere"))
    talker.serve("there", receiver)
    sender.open("d", "there")
    target = sender.target(Peer("d", 1))
    assert target is not None and target.ends == ((RankEnd("tcp", "d:1"),),)
    only.open("d", "there")
    assert only.target(Peer("d", 1)) is None and at_only.refused == ["d"]


def test_the_newest_life_of_a_sender_is_answered_and_older_ones_are_refused() -> None:
    talker = InProcessKvTalker()
    receiver, at_receiver = lines_of(talker, facts("d"))
    talker.serve("there", receiver)
    ways = {life: lines_of(talker, facts("p", life)) for life in (2, 3, 1)}
    for lines, _ in ways.values():
        lines.open("d", "there")
    assert receiver.say_to_sender("p", BEAT)
    assert [len(heard.receivers) for _, heard in ways.values()] == [0, 1, 0]
    assert ways[1][1].refused == ["d"], "a life that is over learns that it is"
    assert receiver.source(Peer("p", 3)) == LAYOUT and receiver.source(Peer("p", 2)) is None
    assert not at_receiver.gone


def test_a_receiver_that_was_started_anew_is_met_anew() -> None:
    talker = InProcessKvTalker()
    sender, _ = lines_of(talker, facts("p"))
    sender.open("d", "there")
    for life in (1, 2):
        receiver, _ = lines_of(talker, facts("d", life))
        talker.serve("there", receiver)
        assert sender.target(Peer("d", life)) is not None
    assert sender.target(Peer("d", 1)) is None


@pytest.mark.parametrize("what", [{"model": "other"}, {"dtype": "bfloat16"}, {"head_dim": 8}, {"checksum": "none"}])
def test_kv_that_does_not_fit_is_refused_by_name(what: dict[str, Any]) -> None:
    talker = InProcessKvTalker()
    receiver, _ = lines_of(talker, facts("d"))
    talker.serve("there", receiver)
    sender, at_sender = lines_of(talker, facts("p", **what))
    sender.open("d", "there")
    assert at_sender.refused == ["d"] and sender.target(Peer("d", 1)) is None
    with pytest.raises(KvMismatch, match=next(iter(what))):
        receiver.greet(facts("p", **what), _NoLine(facts("p", **what)))


def test_a_replica_with_ends_of_other_ranks_is_refused() -> None:
    receiver, _ = lines_of(InProcessKvTalker(), facts("d"))
    wrong = replace(facts("p"), ends=())
    with pytest.raises(KvMismatch, match="0 ranks"):
        receiver.greet(wrong, _NoLine(wrong))
    itself = facts("d", 2)
    with pytest.raises(KvMismatch, match="both"):
        receiver.greet(itself, _NoLine(itself))


def test_of_many_senders_those_met_longest_ago_are_forgotten() -> None:
    receiver, heard = lines_of(InProcessKvTalker(), facts("d"))
    for number in range(600):
        theirs = facts(f"p{number}")
        receiver.greet(theirs, _NoLine(theirs))
    assert heard.gone == [f"p{number}" for number in range(88)]
    assert receiver.source(Peer("p87", 1)) is None and receiver.source(Peer("p88", 1)) == LAYOUT


def test_a_caller_that_never_gets_through_is_given_up_and_called_again_when_wanted() -> None:
    talker = InProcessKvTalker()
    sender, _ = lines_of(talker, facts("p"))
    sender.open("d", "there")
    for _ in range(10):
        receiver, _ = lines_of(talker, facts("other"))
        talker.serve("there", receiver)
    assert not sender.say_to_receiver("d", BEAT)
    receiver, _ = lines_of(talker, facts("d"))
    talker.serve("there", receiver)
    assert sender.open("d", "there") and sender.say_to_receiver("d", BEAT)


class _NoLine:
    """A line that nobody hears."""

    def __init__(self, theirs: KvFacts) -> None:
        self.theirs = theirs

    def say(self, message: FromReceiver) -> bool:
        del message
        return False

    def close(self) -> None:
        pass
