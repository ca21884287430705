"""What a rank sends and what it lets in, event by event."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slipstream.comm.errors import CommMisuse
from slipstream.comm.kv.frame import KvFrame, KvHeader
from slipstream.comm.kv.incoming import Drop, Incoming, Outcome, Write
from slipstream.comm.kv.outgoing import Outgoing, Post
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
from slipstream.placement.kv_routes import KvLayout

ROW_BYTES = 2
LAYOUT = KvLayout(layers=2, kv_heads=2, block_size=4)
TRANSFER = TransferId("prefill-0", 1, 5)
PREFILL, DECODE = PeerRank(Peer("prefill-0", 1), 0), Peer("decode-0", 9)
DONE = RankDone(transfer=TRANSFER, generation=1, rank=0)
DRAINED = Drained(transfer=TRANSFER, generation=1, rank=0)


def outgoing(layout: KvLayout = LAYOUT, *, max_frame_bytes: int = 1 << 20) -> Outgoing:
    found = Outgoing(rank=0, layout=layout, entry_bytes=2 * ROW_BYTES, max_frame_bytes=max_frame_bytes)
    found.track(TRANSFER)
    found.add_blocks(TRANSFER, [7, 3])
    return found


def sending(tokens: range, *, generation: int = 1) -> OpenSending:
    return OpenSending(transfer=TRANSFER, generation=generation, to=DECODE, tokens=tokens, blocks=())


def take(out: Outgoing) -> list[Post]:
    posts = []
    while (post := out.next_post()) is not None:
        out.posted()
        posts.append(post)
    return posts


def places(posts: list[Post]) -> list[tuple[int, range]]:
    return [(post.frame.layer, post.frame.tokens) for post in posts]


# ------------------------------------------------------------------ what goes out


def test_a_layer_goes_out_when_it_is_computed() -> None:
    """While the next one computes; and a chunk goes on where the last one ended."""
    out = outgoing()
    out.open(sending(range(8)), LAYOUT)
    assert out.next_post() is None
    out.computed(TRANSFER, 0, 5)
    assert places(take(out)) == [(0, range(0, 5))]
    out.computed(TRANSFER, 1, 5)
    assert places(take(out)) == [(1, range(0, 5))]
    out.computed(TRANSFER, 0, 5)
    assert out.next_post() is None, "said twice"
    out.computed(TRANSFER, 0, 8)
    out.computed(TRANSFER, 1, 8)
    posts = take(out)
    assert places(posts) == [(0, range(5, 8)), (1, range(5, 8))]
    assert posts[0].to == PeerRank(DECODE, 0) and list(posts[0].blocks) == [7, 3]
    assert posts[0].frame.receiver == 9


def test_a_grant_that_comes_late_finds_everything_ready() -> None:
    out = outgoing()
    out.computed(TRANSFER, 0, 8)
    out.computed(TRANSFER, 1, 6)
    out.open(sending(range(8)), LAYOUT)
    assert places(take(out)) == [(0, range(8)), (1, range(6))]


def test_a_prefix_that_is_there_is_not_sent() -> None:
    out = outgoing()
    out.open(sending(range(4, 8)), LAYOUT)
    out.computed(TRANSFER, 0, 3)
    assert out.next_post() is None
    out.computed(TRANSFER, 0, 7)
    assert places(take(out)) == [(0, range(4, 7))]


def test_frames_are_as_large_as_they_may_be_and_end_at_blocks() -> None:
    out = outgoing(max_frame_bytes=40)
    out.open(sending(range(8)), LAYOUT)
    out.computed(TRANSFER, 0, 8)
    assert places(take(out)) == [(0, range(0, 4)), (0, range(4, 8))]


def test_a_rank_is_done_when_all_that_is_its_own_was_sent() -> None:
    out = outgoing()
    out.open(sending(range(8)), LAYOUT)
    for layer in range(2):
        out.computed(TRANSFER, layer, 8)
    first, second = take(out)
    out.released(first.frame, sent=True)
    assert out.take_reports() == []
    out.released(second.frame, sent=True)
    assert out.take_reports() == [DONE]


@pytest.mark.parametrize("tokens", [range(8, 8), range(8)])
def test_a_rank_with_nothing_to_send_is_done_at_once(tokens: range) -> None:
    """Everything is there already, or others that hold the same send it."""
    layout = LAYOUT if not tokens else KvLayout(layers=1, kv_heads=1, block_size=4, tp=2)
    target = replace(layout, tp=1)
    out = Outgoing(rank=1 if tokens else 0, layout=layout, entry_bytes=2 * ROW_BYTES, max_frame_bytes=100)
    out.open(sending(tokens), target)
    assert [type(report) for report in out.take_reports()] == [RankDone]


def test_class_3_what_is_read_is_not_drained() -> None:
    out = outgoing()
    out.open(sending(range(8)), LAYOUT)
    out.computed(TRANSFER, 0, 8)
    (post,) = take(out)
    out.computed(TRANSFER, 1, 8)
    out.close(TRANSFER, 1)
    out.forget(TRANSFER)
    assert out.next_post() is None and out.take_reports() == []
    out.released(post.frame, sent=True)
    assert out.take_reports() == [DRAINED]
    # It is over: nothing of it is known, and closing again is answered all the same.
    out.computed(TRANSFER, 1, 8)
    out.close(TRANSFER, 1)
    assert out.next_post() is None and out.take_reports() == [DRAINED]


def test_the_next_generation_sends_everything_again() -> None:
    out = outgoing()
    out.open(sending(range(8)), LAYOUT)
    out.computed(TRANSFER, 0, 8)
    (post,) = take(out)
    out.close(TRANSFER, 1)
    out.released(post.frame, sent=False)
    out.open(sending(range(4, 8), generation=2), replace(LAYOUT, block_size=2))
    out.computed(TRANSFER, 1, 8)
    posts = take(out)
    assert places(posts) == [(0, range(4, 8)), (1, range(4, 8))]
    assert {(post.frame.generation, post.block_sizes) for post in posts} == {(2, (4, 2))}


def test_class_2_a_frame_that_could_not_be_sent_breaks_the_transfer_once() -> None:
    out = outgoing(max_frame_bytes=40)
    out.open(sending(range(8)), LAYOUT)
    out.computed(TRANSFER, 0, 8)
    for post in take(out):
        out.released(post.frame, sent=False)
    broken = RankBroken(transfer=TRANSFER, generation=1, rank=0, ending=Ending.PEER_LOST)
    assert out.take_reports() == [broken]


# ------------------------------------------------------------------ what comes in


FRAME = KvFrame(
    transfer=TRANSFER,
    generation=1,
    receiver=9,
    layer=1,
    first_head=0,
    num_heads=2,
    first_token=4,
    num_tokens=4,
)


def header(**change: int) -> KvHeader:
    frame = replace(FRAME, **change)  # type: ignore[arg-type] # numbers by name
    return KvHeader(frame=frame, payload_bytes=frame.payload_bytes(2 * ROW_BYTES), checksum=0)


def incoming(tokens: range = range(4, 10)) -> Incoming:
    found = Incoming(rank=0, incarnation=9, layout=LAYOUT, num_blocks=8, entry_bytes=2 * ROW_BYTES)
    found.open(OpenReceiving(transfer=TRANSFER, generation=1, tokens=tokens, blocks=(2, 5, 7)), LAYOUT)
    assert found.take_reports() == [RankOpened(transfer=TRANSFER, generation=1, rank=0)]
    return found


@pytest.mark.parametrize(
    "change",
    [
        {"layer": 2},
        {"layer": 1 << 31},
        {"first_head": 1},
        {"num_heads": 1},
        {"num_heads": 1 << 30},
        {"first_token": 3},
        {"first_token": 8},
        {"first_token": 1 << 62},
        {"num_tokens": 0},
        {"num_tokens": 1 << 31},
    ],
)
def test_class_5_a_frame_outside_the_grant_ends_the_transfer(change: dict[str, int]) -> None:
    gate = incoming()
    assert gate.admit(header(**change), PREFILL) is Drop.BAD
    broken = RankBroken(transfer=TRANSFER, generation=1, rank=0, ending=Ending.BAD_FRAME)
    assert gate.take_reports() == [broken]
    # Nothing more of it is stored, and it is said once.
    assert gate.admit(header(), PREFILL) is Drop.LATE and gate.admit(header(**change), PREFILL) is Drop.LATE
    assert gate.take_reports() == [] and gate.dropped == {Drop.BAD: 1, Drop.LATE: 2}


def test_class_5_a_frame_from_a_rank_whose_part_it_is_not() -> None:
    gate = incoming()
    assert gate.admit(header(), PeerRank(PREFILL.peer, 1)) is Drop.BAD


def test_class_5_frames_of_others_change_nothing() -> None:
    gate = incoming()
    for peer in (Peer("prefill-1", 1), Peer("prefill-0", 2)):
        assert gate.admit(header(), PeerRank(peer, 0)) is Drop.FOREIGN
    assert gate.admit(header(generation=2), PREFILL) is Drop.UNKNOWN
    assert gate.admit(header(receiver=8), PREFILL) is Drop.STALE
    assert gate.take_reports() == [] and isinstance(gate.admit(header(), PREFILL), Write)


def test_class_4_a_write_under_way_is_waited_for() -> None:
    gate = incoming()
    write = gate.admit(header(), PREFILL)
    assert isinstance(write, Write) and (write.blocks, write.cuts) == ((2, 5, 7), (4, 8))
    gate.close(TRANSFER, 1)
    assert gate.admit(header(layer=0), PREFILL) is Drop.LATE
    assert gate.take_reports() == []
    gate.finish(write, Outcome.APPLIED)
    assert gate.take_reports() == [DRAINED]
    assert gate.admit(header(layer=0), PREFILL) is Drop.LATE, "also after it was forgotten"
    gate.close(TRANSFER, 1)
    assert gate.take_reports() == [DRAINED]


def test_class_7_a_part_is_not_all() -> None:
    gate = incoming()
    for layer in (0, 1):
        for first, count in ((4, 4), (8, 2)):
            assert gate.take_reports() == []
            write = gate.admit(header(layer=layer, first_token=first, num_tokens=count), PREFILL)
            assert isinstance(write, Write)
            gate.finish(write, Outcome.APPLIED)
    assert gate.take_reports() == [DONE]


def test_class_7_parts_come_from_the_ranks_that_the_routes_name() -> None:
    """Two ranks hold the one head; each sends one of the layers, and the other may not."""
    source = KvLayout(layers=2, kv_heads=1, block_size=4, tp=2)
    gate = Incoming(rank=0, incarnation=9, layout=replace(source, tp=1), num_blocks=8, entry_bytes=2 * ROW_BYTES)
    gate.open(OpenReceiving(transfer=TRANSFER, generation=1, tokens=range(4), blocks=(2,)), source)
    ranks = [PeerRank(PREFILL.peer, rank) for rank in range(2)]
    for layer in (0, 1):
        write = gate.admit(header(layer=layer, num_heads=1, first_token=0), ranks[layer])
        assert isinstance(write, Write)
        gate.finish(write, Outcome.APPLIED)
    assert [type(report) for report in gate.take_reports()] == [RankOpened, RankDone]


@pytest.mark.parametrize(
    ("blocks", "text"),
    [((2, 5), "too few blocks"), ((2, 5, 5), "twice"), ((2, 5, 8), "beyond"), ((2, -1, 3), "beyond")],
)
def test_blocks_that_cannot_be_are_refused(blocks: tuple[int, ...], text: str) -> None:
    gate = Incoming(rank=0, incarnation=9, layout=LAYOUT, num_blocks=8, entry_bytes=2 * ROW_BYTES)
    with pytest.raises(CommMisuse, match=text):
        gate.open(OpenReceiving(transfer=TRANSFER, generation=1, tokens=range(4, 10), blocks=blocks), LAYOUT)


def test_nothing_to_receive_is_done_at_once() -> None:
    gate = Incoming(rank=0, incarnation=9, layout=LAYOUT, num_blocks=8, entry_bytes=2 * ROW_BYTES)
    gate.open(OpenReceiving(transfer=TRANSFER, generation=1, tokens=range(8, 8), blocks=(2, 5)), LAYOUT)
    assert gate.take_reports()[1:] == [DONE]
