"""What drivers say about KV, as bytes: it comes back the same, and hostile bytes are refused by name."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.comm.kv.transfer import (
    Acknowledged,
    Deferred,
    End,
    Ending,
    Finish,
    Granted,
    Heartbeat,
    Reserve,
    TransferId,
)
from slipstream.placement.kv_routes import KvLayout
from slipstream.runtime.rpc import codec_kv
from slipstream.runtime.rpc.codec import MAX_MESSAGE_BYTES, MAX_TIMEOUT_S
from slipstream.runtime.rpc.generated import kv_pb2 as pb
from slipstream.runtime.rpc.kv_talk import KvFacts
from slipstream.sdk.errors import InvalidRequest
from slipstream.tests.fakes.kv_talkers import TRANSFER, facts

INT32 = 2**31 - 1
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
numbers = st.integers(0, 2**63 - 1)
transfers = st.builds(TransferId, names, numbers, numbers)
which: dict[str, Any] = {"transfer": transfers, "generation": st.integers(1, INT32)}
ends = st.builds(End, **which, ending=st.sampled_from(Ending))
heartbeats = st.builds(Heartbeat, alive=st.lists(st.tuples(transfers, which["generation"]), max_size=3).map(tuple))
layouts = st.builds(
    lambda layers, pp, **others: KvLayout(layers=layers + pp, pp=pp, **others),
    layers=st.integers(0, 100),
    **dict.fromkeys(("pp", "tp", "copies"), st.integers(1, 3)),
    **dict.fromkeys(("kv_heads", "block_size"), st.integers(1, 64)),
)


@st.composite
def some_facts(draw: st.DrawFn) -> KvFacts:
    known = facts(draw(names), draw(numbers), layout=draw(layouts))
    return known if draw(st.booleans()) else replace(known, offer=None, host_id=draw(names))


from_sender = (
    some_facts()
    | st.builds(
        Reserve,
        **which,
        tokens=st.integers(1, INT32),
        timeout_s=st.floats(0, MAX_TIMEOUT_S),
        hint=st.binary(max_size=20),
    )
    | st.builds(Finish, **which, hand_off=st.binary(max_size=20))
    | ends
    | heartbeats
)
from_receiver = (
    some_facts()
    | st.builds(
        Granted,
        **which,
        blocks=st.lists(st.integers(0, INT32), max_size=9).map(tuple),
        first_token=st.integers(0, INT32),
    )
    | st.builds(Deferred, **which)
    | st.builds(Acknowledged, **which)
    | ends
    | heartbeats
)


@given(from_sender)
def test_what_a_sender_says_comes_back_the_same(message: Any) -> None:
    assert codec_kv.decode_from_sender(codec_kv.encode_from_sender(message)) == message


@given(from_receiver)
def test_what_a_receiver_says_comes_back_the_same(message: Any) -> None:
    assert codec_kv.decode_from_receiver(codec_kv.encode_from_receiver(message)) == message


def test_a_deadline_that_has_just_passed_travels_as_none_left() -> None:
    late = Reserve(transfer=TRANSFER, generation=1, tokens=1, timeout_s=-0.5)
    assert codec_kv.decode_from_sender(codec_kv.encode_from_sender(late)) == replace(late, timeout_s=0.0)


def transfer(**changes: Any) -> pb.KvTransfer:
    return pb.KvTransfer(**{"replica": "p", "incarnation": 1, "number": 1, "generation": 1, **changes})


def reserve(**changes: Any) -> pb.KvFromSender:
    return pb.KvFromSender(reserve=pb.KvReserve(**{"transfer": transfer(), "tokens": 5, **changes}))


def wire_facts(**changes: Any) -> pb.KvFromSender:
    wire = pb.KvFromSender.FromString(codec_kv.encode_from_sender(facts("p-1")))
    for name, value in changes.items():
        if isinstance(value, list):
            del getattr(wire.facts, name)[:]
            getattr(wire.facts, name).extend(value)
        elif name == "layout":
            wire.facts.layout.CopyFrom(value)
        else:
            setattr(wire.facts, name, value)
    return wire


def layout(**changes: int) -> pb.KvLayout:
    sizes = {"layers": 4, "kv_heads": 2, "block_size": 16, "tp": 1, "pp": 1, "copies": 1}
    return pb.KvLayout(**{**sizes, **changes})


def one_end(**addresses: str) -> list[pb.KvRankEnds]:
    return [pb.KvRankEnds(addresses=addresses)]


WRONG_FROM_SENDER: list[tuple[str, pb.KvFromSender]] = [
    ("message", pb.KvFromSender()),
    ("replica", pb.KvFromSender(reserve=pb.KvReserve(tokens=1))),
    *(("replica", reserve(transfer=transfer(replica=name))) for name in ("", 257 * "x")),
    ("incarnation", reserve(transfer=transfer(incarnation=2**63))),
    ("number", reserve(transfer=transfer(number=2**64 - 1))),
    *(("generation", reserve(transfer=transfer(generation=number))) for number in (0, 2**31)),
    *(("tokens", reserve(tokens=number)) for number in (0, 2**32 - 1)),
    *(("timeout_s", reserve(timeout_s=value)) for value in (-1.0, math.nan, math.inf, 1e300)),
    ("hint", reserve(hint=bytes(codec_kv.MAX_HINT_BYTES + 1))),
    (
        "hand_off",
        pb.KvFromSender(
            finish=pb.KvFinish(transfer=transfer(), hand_off=bytes(codec_kv.MAX_HAND_OFF_BYTES + 1)),
        ),
    ),
    *(("ending", pb.KvFromSender(end=pb.KvEnd(transfer=transfer(), ending=text))) for text in ("", "well")),
    ("alive", pb.KvFromSender(heartbeat=pb.KvHeartbeat(alive=(codec_kv.MAX_ALIVE + 1) * [transfer()]))),
    ("generation", pb.KvFromSender(heartbeat=pb.KvHeartbeat(alive=[transfer(), transfer(generation=0)]))),
    ("protocol_version", wire_facts(protocol_version=2)),
    ("replica", wire_facts(replica="")),
    ("incarnation", wire_facts(incarnation=2**63)),
    *(("layout", wire_facts(layout=layout(tp=size))) for size in (0, 2**17, 2**32 - 1)),
    ("layout", wire_facts(layout=layout(pp=5))),
    ("ends", wire_facts(layout=layout(tp=2))),
    ("ends", wire_facts(layout=layout(tp=2**16))),
    ("ends", wire_facts(ends=[])),
    ("ends", wire_facts(ends=5000 * [pb.KvRankEnds()])),
    ("ends", wire_facts(ends=one_end(**{f"kind{number}": "a" for number in range(9)}))),
    *(("ends", wire_facts(ends=one_end(**{kind: "a"}))) for kind in ("", "TCP", "a b", 17 * "x")),
    *(("ends", wire_facts(ends=one_end(tcp=address))) for address in ("", "a\nb", "\0", 257 * "x")),
    ("host_id", wire_facts(host_id=129 * "x")),
    ("offer", wire_facts(offer=b"{")),
    ("offer", wire_facts(offer=bytes(5000))),
    ("offer", wire_facts(replica="p-2")),
    ("offer", wire_facts(layout=layout(kv_heads=4))),
]


@pytest.mark.parametrize(("field", "wire"), WRONG_FROM_SENDER)
def test_what_no_sender_can_say_names_the_field(field: str, wire: pb.KvFromSender) -> None:
    with pytest.raises(InvalidRequest) as caught:
        codec_kv.decode_from_sender(wire.SerializeToString())
    assert caught.value.field == field


def granted(**changes: Any) -> pb.KvFromReceiver:
    return pb.KvFromReceiver(granted=pb.KvGranted(**{"transfer": transfer(), "blocks": [1], **changes}))


@pytest.mark.parametrize(
    ("field", "wire"),
    [
        ("message", pb.KvFromReceiver()),
        ("replica", pb.KvFromReceiver(deferred=pb.KvDeferred())),
        ("generation", pb.KvFromReceiver(acknowledged=pb.KvAcknowledged(transfer=transfer(generation=0)))),
        ("blocks", granted(blocks=[1, 2**31])),
        ("blocks", granted(blocks=(codec_kv.MAX_BLOCKS + 1) * [1])),
        ("first_token", granted(first_token=2**31)),
        ("ending", pb.KvFromReceiver(end=pb.KvEnd(transfer=transfer(), ending="COMMITTED"))),
        ("alive", pb.KvFromReceiver(heartbeat=pb.KvHeartbeat(alive=(codec_kv.MAX_ALIVE + 1) * [transfer()]))),
        ("protocol_version", pb.KvFromReceiver(facts=pb.KvFacts())),
    ],
)
def test_what_no_receiver_can_say_names_the_field(field: str, wire: pb.KvFromReceiver) -> None:
    with pytest.raises(InvalidRequest) as caught:
        codec_kv.decode_from_receiver(wire.SerializeToString())
    assert caught.value.field == field


@pytest.mark.parametrize("decode", [codec_kv.decode_from_sender, codec_kv.decode_from_receiver])
def test_bytes_that_are_no_message_are_refused(decode: Any) -> None:
    for garbage in (b"\xff\xff\xff", bytes(MAX_MESSAGE_BYTES + 1)):
        with pytest.raises(InvalidRequest) as caught:
            decode(garbage)
        assert caught.value.field == "message"


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for decode in (codec_kv.decode_from_sender, codec_kv.decode_from_receiver):
        try:
            decode(data)
        except InvalidRequest as error:
            assert error.field


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("replica", replace(facts("p-1"), replica="", offer=None)),
        ("ends", replace(facts("p-1"), ends=())),
        ("offer", replace(facts("p-1"), incarnation=9)),
        ("tokens", Reserve(transfer=TRANSFER, generation=1, tokens=0, timeout_s=1.0)),
        ("generation", End(transfer=TRANSFER, generation=0, ending=Ending.STALE)),
        ("hand_off", Finish(transfer=TRANSFER, generation=1, hand_off=bytes(codec_kv.MAX_HAND_OFF_BYTES + 1))),
        ("alive", Heartbeat(alive=(codec_kv.MAX_ALIVE + 1) * ((TRANSFER, 1),))),
    ],
)
def test_what_cannot_travel_is_refused_before_it_is_sent(field: str, message: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        codec_kv.encode_from_sender(message)
    assert caught.value.field == field


@pytest.mark.parametrize("block", [-1, 2**31])
def test_a_grant_of_blocks_that_cannot_be_is_refused_before_it_is_sent(block: int) -> None:
    with pytest.raises(InvalidRequest, match="blocks"):
        codec_kv.encode_from_receiver(Granted(transfer=TRANSFER, generation=1, blocks=(1, block), first_token=0))
