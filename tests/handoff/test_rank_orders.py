"""Orders and words about KV as bytes: they come back as they were, and nothing else is believed."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.comm.errors import BadFrame
from slipstream.comm.kv.transfer import (
    Drained,
    Ending,
    OpenReceiving,
    OpenSending,
    Peer,
    PeerRank,
    RankBroken,
    RankDone,
    RankOpened,
    TransferId,
)
from slipstream.comm.kv.transport import PeerDown
from slipstream.placement.kv_routes import KvLayout
from slipstream.runtime.handoff.rank_orders import (
    CloseTransfer,
    ForgetTransfer,
    KvOrder,
    KvTarget,
    OpenReceive,
    OpenSend,
    RankEnd,
    RankMoved,
    RankWord,
    decode_ends,
    decode_order,
    decode_word,
    encode_ends,
    encode_order,
    encode_word,
)

TRANSFER = TransferId("prefill-0", 1_760_000_000_000, 7)
LAYOUT = KvLayout(layers=80, kv_heads=8, block_size=16, tp=2, pp=1, copies=1)
ENDS = ((RankEnd("shm", "unix:/tmp/a/shm"), RankEnd("tcp", "[::1]:4000")), ())
ORDERS: list[KvOrder] = [
    OpenSend(
        grant=OpenSending(
            transfer=TRANSFER, generation=2, to=Peer("decode-0", 9), tokens=range(16, 1000), blocks=(5, 0, 1 << 40)
        ),
        target=KvTarget(layout=LAYOUT, ends=ENDS),
    ),
    OpenReceive(
        grant=OpenReceiving(transfer=TRANSFER, generation=1, tokens=range(0), blocks=()),
        source=LAYOUT,
    ),
    CloseTransfer(transfer=TRANSFER, generation=3),
    ForgetTransfer(transfer=TRANSFER),
]
WORDS: list[RankWord] = [
    RankOpened(transfer=TRANSFER, generation=1, rank=3),
    RankDone(transfer=TRANSFER, generation=1, rank=3),
    Drained(transfer=TRANSFER, generation=1, rank=3),
    *(RankBroken(transfer=TRANSFER, generation=1, rank=3, ending=ending) for ending in Ending),
    RankMoved(transfer=TRANSFER, generation=1, rank=3, bytes_out=1 << 40, bytes_in=2, wire_s=0.5, hidden_s=0.25),
    PeerDown(PeerRank(Peer("decode-0", 9), 1), "it is gone"),
]


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_comes_back(order: KvOrder) -> None:
    assert decode_order(encode_order(order)) == order


@pytest.mark.parametrize("word", WORDS)
def test_a_word_comes_back(word: RankWord) -> None:
    assert decode_word(encode_word(word), rank=3) == word


def test_ends_come_back() -> None:
    assert decode_ends(encode_ends(ENDS[0])) == ENDS[0]


def test_a_long_reason_is_cut() -> None:
    word = PeerDown(PeerRank(Peer("decode-0", 9), 1), "ü" * 100_000)
    decoded = decode_word(encode_word(word), rank=0)
    assert isinstance(decoded, PeerDown) and decoded.why == "ü" * 1024


def changed(order: KvOrder, at: int, value: Any) -> bytes:
    """Return an order's bytes with another value at a place."""
    values = msgpack.unpackb(encode_order(order))
    values[at] = value
    packed: bytes = msgpack.packb(values)
    return packed


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgpack.packb({}),
        msgpack.packb([]),
        msgpack.packb(["send"]),
        msgpack.packb(["sing", "prefill-0", 1, 2]),
        encode_order(ORDERS[2])[:-1],
        encode_order(ORDERS[2]) + b"\x00",
        changed(ORDERS[0], 0, 7),
        changed(ORDERS[0], 1, b"prefill-0"),
        changed(ORDERS[0], 2, -1),
        changed(ORDERS[0], 2, True),
        changed(ORDERS[0], 2, 1 << 63),
        changed(ORDERS[0], 4, 1.0),
        changed(ORDERS[0], 5, 1001),
        changed(ORDERS[0], 7, b"seven"),
        changed(ORDERS[0], 7, b"\xff" * 8),
        changed(ORDERS[0], 8, ["decode-0"]),
        changed(ORDERS[0], 9, [80, 8, 16, 2, 1, 0]),
        changed(ORDERS[0], 9, [80, 8, 16, 4, 1, 1]),
        changed(ORDERS[0], 10, [[["tcp"]], []]),
        changed(ORDERS[0], 10, [[["tcp", "a:1"]] * 9, []]),
        changed(ORDERS[0], 10, "nowhere"),
    ],
)
def test_what_is_no_order_is_refused(data: bytes) -> None:
    with pytest.raises(BadFrame):
        decode_order(data)


@pytest.mark.parametrize(
    "values",
    [
        ["done", "prefill-0", 1, 7],
        ["done", "prefill-0", 1, 7, 1, 1],
        ["broken", "prefill-0", 1, 7, 1, "bored"],
        ["moved", "prefill-0", 1, 7, 1, 1, 1, -0.5, 0.0],
        ["moved", "prefill-0", 1, 7, 1, 1, 1, float("nan"), 0.0],
        ["moved", "prefill-0", 1, 7, 1, 1, 1, 1, 0.0],
        ["down", "decode-0", 1, 0, 4],
        ["up", "prefill-0", 1, 7, 1],
    ],
)
def test_what_is_no_word_is_refused(values: list[Any]) -> None:
    with pytest.raises(BadFrame):
        decode_word(msgpack.packb(values), rank=0)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    for decode in (decode_order, decode_ends, lambda data: decode_word(data, rank=0)):
        try:
            decode(data)
        except BadFrame:
            continue


@given(st.sampled_from(ORDERS), st.integers(0, 400), st.integers(0, 255))
def test_an_order_with_a_broken_byte_is_an_order_or_refused(order: KvOrder, at: int, byte: int) -> None:
    data = bytearray(encode_order(order))
    data[at % len(data)] = byte
    try:
        decode_order(bytes(data))
    except BadFrame:
        return
