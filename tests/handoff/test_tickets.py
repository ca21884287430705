"""Who waits under a ticket, and what a hand-off says: pure parts of a desk, and bytes that are none."""

from __future__ import annotations

import random
from dataclasses import replace

import msgpack
import numpy as np
import pytest

from slipstream.comm.kv.transfer import Ending, Reserve, TransferId
from slipstream.runtime.handoff.hand_off import HandOff, decode_hand_off, encode_hand_off
from slipstream.runtime.handoff.tickets import MAX_HINT_BYTES, Tickets, hint_of, known_tokens
from slipstream.runtime.messages import TokenLogprobs
from slipstream.tests.engine.builders import request

VOCABULARY = 100


def reserve(hint: bytes, tokens: int = 5, number: int = 1) -> Reserve:
    transfer = TransferId("p", 1, number)
    return Reserve(transfer=transfer, generation=1, tokens=tokens, timeout_s=1.0, hint=hint)


def test_a_ticket_is_one_requests_once() -> None:
    tickets = Tickets()
    assert tickets.why_not(reserve(hint_of("t"))) is None, "nobody has it yet"
    assert tickets.of(reserve(hint_of("t"))) is None
    waits = tickets.add("t", request("r", [1, 2, 3, 4, 5]))
    assert waits is not None and tickets.of(reserve(hint_of("t"))) is waits
    assert tickets.why_not(reserve(hint_of("t"))) is None
    assert tickets.add("t", request("other", [1])) is None
    waits.arrived = True
    assert tickets.why_not(reserve(hint_of("t"))) is Ending.CONSUMED
    assert tickets.remove("t", Ending.CONSUMED) is waits
    assert tickets.why_not(reserve(hint_of("t"))) is Ending.CONSUMED
    assert tickets.add("t", request("r", [1])) is None and tickets.remove("t", Ending.CANCELLED) is None
    assert len(tickets) == 0


def test_what_cannot_be_for_a_request_is_refused() -> None:
    tickets = Tickets()
    tickets.add("t", request("r", [1, 2, 3]))
    for wrong in (reserve(hint_of("t"), 4), reserve(b""), reserve(b"\xff\xfe"), reserve(bytes(MAX_HINT_BYTES + 1))):
        assert tickets.why_not(wrong) is Ending.BAD_REFERENCE
    drawn = np.array([7, 8], dtype=np.int32)
    begun = replace(request("r", [1, 2, 3]), generated=(drawn,))
    assert known_tokens(begun) == 5


def test_tickets_that_are_over_are_remembered_within_bounds() -> None:
    tickets = Tickets()
    for number in range(9000):
        tickets.add(f"t{number}", request("r", [1]))
        tickets.remove(f"t{number}", Ending.CANCELLED)
    assert tickets.why_not(reserve(hint_of("t0"))) is None and len(tickets._gone) == 8192
    assert tickets.why_not(reserve(hint_of("t8999"))) is Ending.CANCELLED


@pytest.mark.parametrize("k", [None, 0, 5])
def test_a_hand_off_comes_as_it_went(k: int | None) -> None:
    scores = None
    if k is not None:
        ids = np.arange(1 + k, dtype=np.int32)
        scores = TokenLogprobs(token_ids=ids, logprobs=-ids.astype(np.float32) / np.float32(3), rank=3)
    came = decode_hand_off(encode_hand_off(HandOff(token_id=42, logprobs=scores)), vocab_size=VOCABULARY)
    assert came is not None and came.token_id == 42
    if scores is None:
        assert came.logprobs is None
    else:
        assert came.logprobs is not None and came.logprobs.rank == 3
        assert np.array_equal(came.logprobs.token_ids, scores.token_ids)
        assert np.array_equal(came.logprobs.logprobs, scores.logprobs)


@pytest.mark.parametrize(
    "fields",
    [
        None,
        7,
        [],
        [VOCABULARY],
        [-1],
        [True],
        ["7"],
        [7, b"", b"", 1],
        [7, b"\0" * 4, b"\0" * 8, 1],
        [7, b"\0" * 6, b"\0" * 6, 1],
        [7, b"\xff" * 4, b"\0" * 4, 1],
        [7, (VOCABULARY).to_bytes(4, "little"), b"\0" * 4, 1],
        [7, b"\0" * 4, b"\0" * 4, VOCABULARY + 1],
        [7, b"\0" * 4, b"\0" * 4, 1, 1],
        [7, b"\0" * 4],
    ],
)
def test_a_hand_off_that_cannot_be_is_none(fields: object) -> None:
    assert decode_hand_off(msgpack.packb(fields), vocab_size=VOCABULARY) is None


def test_bytes_that_are_no_hand_off_harm_nobody(seed: int) -> None:
    draw = random.Random(seed)
    right = encode_hand_off(HandOff(token_id=7))
    for _ in range(500):
        data = bytearray(draw.randbytes(draw.randrange(40)) if draw.random() < 0.5 else right)
        if data and draw.random() < 0.7:
            data[draw.randrange(len(data))] = draw.randrange(256)
        came = decode_hand_off(bytes(data), vocab_size=VOCABULARY)
        assert came is None or 0 <= came.token_id < VOCABULARY
    assert decode_hand_off(b"\xc4" + bytes(1 << 21), vocab_size=VOCABULARY) is None
