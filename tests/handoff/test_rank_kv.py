"""Ranks' ends of KV: caches of known contents between replicas in one process, over the transports that serve."""

from __future__ import annotations

import socket
import threading
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from slipstream.comm.errors import CommMisuse
from slipstream.comm.kv.frame import KvFrame, pack_header
from slipstream.comm.kv.meeting import meet_receiver
from slipstream.comm.kv.transfer import (
    Drained,
    Ending,
    OpenReceiving,
    PeerRank,
    RankBroken,
    RankDone,
    RankOpened,
    TransferId,
)
from slipstream.comm.kv.transport import PeerDown
from slipstream.comm.sockets import connect
from slipstream.comm.wire import Deadline
from slipstream.placement.kv_routes import KvLayout
from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.handoff.rank_kv import RankKv
from slipstream.runtime.handoff.rank_orders import CloseTransfer, KvTarget, OpenReceive, OpenSend, RankEnd
from slipstream.runtime.handoff.settings import KvLimits, KvSeat
from slipstream.runtime.worker.step_kv import StepKv
from slipstream.tests.comm.kv.kv_bytes import UNTOUCHED
from slipstream.tests.handoff.rank_beds import (
    LIMITS,
    NUM_BLOCKS,
    PATIENCE_S,
    ROW_BYTES,
    SECRET,
    Cache,
    Replica,
    layout_with,
    pair,
    prompt,
    share_of,
    wait_until,
)

TOKENS = 37


def blocks_for(layout: KvLayout, seed: int, pool: range = range(NUM_BLOCKS)) -> list[int]:
    count = -(-TOKENS // layout.block_size)
    return [int(block) for block in np.random.default_rng(seed).permutation(pool)[:count]]


def decode_grant(transfer: TransferId, blocks: list[int]) -> OpenReceiving:
    return OpenReceiving(transfer=transfer, generation=1, tokens=range(10), blocks=tuple(blocks))


def send_all(
    source: Replica,
    target: Replica,
    seed: int,
    *,
    number: int = 1,
    first: int = 0,
    late: bool = False,
    pool: range = range(NUM_BLOCKS),
) -> None:
    """Move a prompt that is computed in chunks, and hold every byte of it against what it should be."""
    what = prompt(source.layout, TOKENS, seed + number, parts=source.parts)
    transfer = source.transfer(number)
    ours, theirs = blocks_for(source.layout, seed), blocks_for(target.layout, seed + 1, pool)
    tokens = range(first, TOKENS)
    target.open_receive(transfer, source.layout, tokens, theirs)
    if not late:
        source.open_send(number, target, tokens, theirs)
    for chunk in (range(11), range(11, 12), range(12, TOKENS)):
        source.compute(number, chunk, ours, what)
    if late:
        source.open_send(number, target, tokens, theirs)
    source.wait_all(RankDone, transfer)
    target.wait_all(RankDone, transfer)
    for cache in target.caches:
        assert cache.holds(tokens, theirs, what)
    target.shut(transfer)
    source.shut(transfer)
    source.forget(number)


@pytest.mark.parametrize("kind", ["tcp", "shm"])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ({}, {}),
        ({"block_size": 3}, {"block_size": 5}),
        ({"tp": 2}, {}),
        ({}, {"tp": 2, "pp": 3}),
        ({"tp": 8}, {"tp": 2, "copies": 2}),
    ],
)
def test_a_prompt_comes_to_its_place(kind: str, source: dict[str, int], target: dict[str, int], seed: int) -> None:
    with pair(layout_with(**source), layout_with(**target), kinds=(kind,)) as (prefill, decode):
        send_all(prefill, decode, seed)
        # Whose grant comes when all is computed, and whose first tokens are there already.
        send_all(prefill, decode, seed, number=2, first=9, late=True)


@pytest.mark.parametrize("kind", ["tcp", "shm"])
def test_latents_come_to_all_ranks(kind: str, seed: int) -> None:
    """One part and one head, which every tensor-parallel rank holds."""
    ours, theirs = layout_with(kv_heads=1, tp=2), layout_with(kv_heads=1, tp=4, block_size=3)
    with pair(ours, theirs, kinds=(kind,), parts=1) as (prefill, decode):
        send_all(prefill, decode, seed)
        assert decode.ranks.moved().bytes_in == 4 * ours.layers * TOKENS * 8


def test_what_was_moved_is_counted(seed: int) -> None:
    with pair(layout_with(tp=2)) as (prefill, decode):
        send_all(prefill, decode, seed)
        layout = decode.layout
        size = 2 * layout.layers * layout.kv_heads * TOKENS * 8
        assert (prefill.ranks.moved().bytes_out, decode.ranks.moved().bytes_in) == (size, size)
        one = prefill.ranks.moved_of(prefill.transfer(1))
        assert one is not None
        assert one.bytes_out == size
        assert 0 <= one.hidden_s <= one.wire_s
        assert prefill.ranks.moved_of(prefill.transfer(2)) is None


def test_nothing_to_send_is_done_at_once(seed: int) -> None:
    """All of it is at the receiver already: nobody is even met."""
    with pair() as (prefill, decode):
        nowhere = KvTarget(layout=decode.layout, ends=((),))
        order = prefill.send_order(1, decode, range(8, 8), [0, 1])
        prefill.ranks.give(OpenSend(grant=order.grant, target=nowhere))
        prefill.wait_all(RankDone, prefill.transfer(1))
        prefill.shut(prefill.transfer(1))


def test_short_prompts_are_posted_when_the_step_ends(seed: int) -> None:
    limits = replace(LIMITS, serial_below_tokens=12)
    with pair(limits=limits) as (prefill, decode):
        transfer = prefill.transfer(1)
        blocks = blocks_for(decode.layout, seed)
        what = prompt(decode.layout, TOKENS, seed)
        decode.open_receive(transfer, prefill.layout, range(TOKENS), blocks)
        prefill.open_send(1, decode, range(TOKENS), blocks)
        kv, cache = prefill.kv[0], prefill.caches[0]
        # A step that is short, and one that is not: of the second, a layer is posted before it ends.
        prefill.compute(1, range(11), blocks, what)
        kv.begin_step([1], [blocks], [TOKENS])
        cache.write(0, range(11, TOKENS), blocks, what)
        kv.layer_done(0)
        theirs = decode.caches[0]
        wait_until(lambda: np.array_equal(theirs.at(0, range(TOKENS), blocks), what[0]))
        assert (theirs.at(1, range(11, TOKENS), blocks) == UNTOUCHED).all()
        for layer in (1, 2):
            cache.write(layer, range(11, TOKENS), blocks, what)
        kv.end_step()
        decode.wait_all(RankDone, transfer)
        assert decode.caches[0].holds(range(TOKENS), blocks, what)


def test_a_short_prompt_waits_for_the_end_of_its_step(seed: int) -> None:
    with pair(limits=replace(LIMITS, serial_below_tokens=TOKENS + 1)) as (prefill, decode):
        transfer = prefill.transfer(1)
        blocks = list(range(NUM_BLOCKS - 10, NUM_BLOCKS))
        decode.open_receive(transfer, prefill.layout, range(TOKENS), blocks)
        prefill.open_send(1, decode, range(TOKENS), blocks)
        prefill.kv[0].begin_step([1], [blocks], [TOKENS])
        for layer in range(3):
            prefill.kv[0].layer_done(layer)
        # What follows on the same connection overtakes nothing, so the first would have been there.
        send_all(prefill, decode, seed, number=2, pool=range(NUM_BLOCKS - 10))
        assert (decode.caches[0].at(0, range(TOKENS), blocks) == UNTOUCHED).all()
        what = prompt(prefill.layout, TOKENS, seed)
        for layer in range(3):
            prefill.caches[0].write(layer, range(TOKENS), blocks, what)
        prefill.kv[0].begin_step([1], [blocks], [TOKENS])
        prefill.kv[0].end_step()
        decode.wait_all(RankDone, transfer)


def test_a_forgotten_transfer_is_tracked_no_more(seed: int) -> None:
    """A step that was on its way when the request was aborted names it once more; nothing may come of that."""
    with pair() as (prefill, decode):
        transfer, blocks = prefill.transfer(1), list(range(NUM_BLOCKS - 10, NUM_BLOCKS))
        prefill.forget(1)
        prefill.compute(1, range(TOKENS), blocks, prompt(prefill.layout, TOKENS, seed))
        send_all(prefill, decode, seed, number=2, pool=range(NUM_BLOCKS - 10))
        decode.open_receive(transfer, prefill.layout, range(TOKENS), blocks)
        prefill.open_send(1, decode, range(TOKENS), blocks)
        prefill.shut(transfer)
        send_all(prefill, decode, seed, number=3, pool=range(NUM_BLOCKS - 10))
        assert (decode.caches[0].at(0, range(TOKENS), blocks) == UNTOUCHED).all()


def test_closing_before_the_target_is_met(seed: int) -> None:
    """The peer takes connections and says nothing, as one does that was stopped: nobody waits for it."""
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pair(limits=replace(LIMITS, connect_timeout_s=1.0)) as (
            prefill,
            decode,
        ),
    ):
        host, port = silent.getsockname()
        grant = prefill.send_order(1, decode, range(TOKENS), range(10)).grant
        stuck = KvTarget(layout=decode.layout, ends=((RankEnd("tcp", f"{host}:{port}"),),))
        prefill.ranks.give(OpenSend(grant=grant, target=stuck))
        prefill.shut(prefill.transfer(1))
        # Others are served meanwhile.
        other = Replica("decode-1", decode.layout)
        with closing(other.ranks):
            send_all(prefill, other, seed, number=2)


def test_a_peer_that_never_answers_is_given_up(seed: int) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pair(limits=replace(LIMITS, connect_timeout_s=0.2)) as (
            prefill,
            decode,
        ),
    ):
        host, port = silent.getsockname()
        grant = prefill.send_order(1, decode, range(TOKENS), range(10)).grant
        stuck = KvTarget(layout=decode.layout, ends=((RankEnd("tcp", f"{host}:{port}"),),))
        prefill.ranks.give(OpenSend(grant=grant, target=stuck))
        prefill.wait(lambda said: any(isinstance(word, RankBroken) for word in said))
        prefill.shut(prefill.transfer(1))


@pytest.mark.parametrize("kind", ["tcp", "shm"])
def test_a_peer_that_is_stopped_holds_nobody_up(kind: str) -> None:
    """It takes no more, in the middle of a frame that no buffer holds: steps, orders and other peers go on."""
    layout = KvLayout(layers=1, kv_heads=1, block_size=64)
    limits = replace(LIMITS, max_frame_bytes=64 << 20, frame_timeout_s=0.5)
    tokens, blocks = range(20 * 64), list(range(20))
    prefill, stopped, other = (
        Replica(name, layout, kinds=(kind,), limits=limits, row_bytes=16_384)
        for name in ("prefill-0", "decode-0", "d-1")
    )
    with closing(prefill.ranks), closing(stopped.ranks), closing(other.ranks):
        gate = stopped.kv[0]._gate
        for number, target in ((1, stopped), (2, other)):
            target.open_receive(prefill.transfer(number), layout, tokens, blocks)
            prefill.open_send(number, target, tokens, blocks)
        with gate.lock:
            # Its threads stand where they would write.
            prefill.kv[0].begin_step([1, 2], [blocks, blocks], [tokens.stop, tokens.stop])
            prefill.kv[0].layer_done(0)
            prefill.kv[0].end_step()
            other.wait_all(RankDone, prefill.transfer(2))
            prefill.shut(prefill.transfer(2))
            # The frame is given up, and with it what it kept of the memory.
            prefill.wait(lambda said: any(isinstance(word, RankBroken) for word in said))
            prefill.shut(prefill.transfer(1))


@pytest.mark.parametrize(
    ("ends", "ending"),
    [
        (((RankEnd("tcp", "127.0.0.1:1"),),), Ending.PEER_LOST),
        (((RankEnd("pigeon", "the roof"),),), Ending.BAD_REFERENCE),
        (((),), Ending.BAD_REFERENCE),
        ((), Ending.BAD_REFERENCE),
    ],
)
def test_ends_that_lead_nowhere(ends: tuple[tuple[RankEnd, ...], ...], ending: Ending) -> None:
    with pair() as (prefill, decode):
        grant = prefill.send_order(1, decode, range(TOKENS), range(10)).grant
        prefill.ranks.give(OpenSend(grant=grant, target=KvTarget(layout=decode.layout, ends=ends)))
        prefill.wait(lambda said: bool(said))
        assert prefill.said == [RankBroken(transfer=prefill.transfer(1), generation=1, rank=0, ending=ending)]
        prefill.shut(prefill.transfer(1))


def test_another_kind_of_transport_serves_where_one_does_not(seed: int) -> None:
    with pair(kinds=("shm", "tcp")) as (prefill, decode):
        assert [end.kind for end in decode.ranks.ends[0]] == ["shm", "tcp"]
        transfer, blocks = prefill.transfer(1), blocks_for(decode.layout, seed)
        decode.open_receive(transfer, prefill.layout, range(TOKENS), blocks)
        grant = prefill.send_order(1, decode, range(TOKENS), blocks).grant
        # As if the two were in containers: one path names another thing there.
        ends = (RankEnd("shm", "unix:/nowhere/at/all"), decode.ranks.ends[0][1])
        prefill.ranks.give(OpenSend(grant=grant, target=KvTarget(layout=decode.layout, ends=(ends,))))
        what = prompt(prefill.layout, TOKENS, seed)
        prefill.compute(1, range(TOKENS), blocks, what)
        decode.wait_all(RankDone, transfer)
        assert decode.caches[0].holds(range(TOKENS), blocks, what)


def test_another_model_is_refused(seed: int) -> None:
    with pair() as (prefill, decode):
        other = KvLayout(layers=3, kv_heads=4, block_size=4)
        cache = Cache.blank(other, 0)
        share = replace(share_of("decode-1", 3, ("tcp",)), model="another")
        kv = RankKv(
            share,
            KvSeat(address="127.0.0.1", secret=SECRET),
            rank=0,
            layout=other,
            cache=cache.layers,
            clock=monotonic_clock,
        )
        with closing(kv):
            grant = prefill.send_order(1, decode, range(TOKENS), range(10)).grant
            grant = replace(grant, to=replace(decode.me, replica="decode-1"))
            prefill.ranks.give(OpenSend(grant=grant, target=KvTarget(layout=other, ends=(kv.ends,))))
            prefill.wait(lambda said: bool(said))
            assert [word.ending for word in prefill.said if isinstance(word, RankBroken)] == [Ending.BAD_REFERENCE]


@pytest.mark.parametrize("blocks", [[0, 1, NUM_BLOCKS], [0, 0, 1], [0]])
def test_a_grant_that_cannot_be_is_refused_and_nothing_else(blocks: list[int], seed: int) -> None:
    with pair() as (prefill, decode):
        transfer = prefill.transfer(1)
        grant = decode_grant(transfer, blocks)
        decode.ranks.give(OpenReceive(grant=grant, source=prefill.layout))
        decode.wait(lambda said: any(isinstance(word, RankBroken) for word in said))
        decode.shut(transfer)
        assert not any(isinstance(word, RankOpened) for word in decode.said)
        send_all(prefill, decode, seed, number=2)


def test_blocks_are_kept_until_a_write_is_over_and_then_are_others(seed: int) -> None:
    """The request is aborted while a frame is half there: its blocks are not given back before the other half came."""
    with pair(limits=replace(LIMITS, checksums=False)) as (prefill, decode):
        first, second = prefill.transfer(1), prefill.transfer(2)
        blocks = decode.caches[0].layers[0][:, 1:3]
        decode.open_receive(first, prefill.layout, range(4), [1])
        with connect(decode.ranks.ends[0][0].address, timeout_s=PATIENCE_S) as sock:
            meet_receiver(sock, prefill.kv[0].offer, "decode-0", SECRET, Deadline(PATIENCE_S, monotonic_clock))
            sock.settimeout(PATIENCE_S)
            head, payload = by_hand(first, 0)
            sock.sendall(head + payload[:40])
            wait_until(lambda: int(blocks[0, 0].flatten()[39]) == payload[39])
            decode.ranks.give(CloseTransfer(transfer=first, generation=1))
            # Carried out after it; and still the block is not free.
            decode.open_receive(second, prefill.layout, range(4), [2])
            assert not any(isinstance(word, Drained) for word in decode.said)
            sock.sendall(payload[40:])
            decode.wait(lambda said: any(isinstance(word, Drained) for word in said))
            # Now it is somebody else's. What comes for it all the same, late or twice, is read over.
            blocks[:, 0] = 7
            sock.sendall(head + payload + b"".join(by_hand(first, 1)))
            for layer in range(3):
                sock.sendall(b"".join(by_hand(second, layer)))
            decode.wait_all(RankDone, second)
        assert bool((blocks[:, 0] == 7).all()) and bool((blocks[:, 1] != UNTOUCHED).all())


def by_hand(transfer: TransferId, layer: int) -> tuple[bytes, bytes]:
    """Return a frame of four tokens of a layer, as another process would send it."""
    frame = KvFrame(
        transfer=transfer,
        generation=1,
        receiver=3,
        layer=layer,
        first_head=0,
        num_heads=4,
        first_token=0,
        num_tokens=4,
    )
    payload = bytes(range(100, 228)) * 2
    assert len(payload) == frame.payload_bytes(2 * ROW_BYTES)
    return pack_header(frame, len(payload), 0), payload


@pytest.mark.parametrize("kind", ["tcp", "shm"])
def test_a_receiver_dies_and_a_later_life_takes_over(kind: str, seed: int) -> None:
    """At the same address, even; nothing that was meant for the earlier life reaches the later one."""
    with pair(kinds=(kind,)) as (prefill, decode):
        what = prompt(prefill.layout, TOKENS, seed)
        transfer, blocks = prefill.transfer(1), blocks_for(decode.layout, seed)
        decode.open_receive(transfer, prefill.layout, range(TOKENS), blocks)
        prefill.open_send(1, decode, range(TOKENS), blocks)
        prefill.compute(1, range(11), blocks, what)
        wait_until(lambda: decode.caches[0].holds(range(11), blocks, what))
        decode.ranks.close()
        prefill.wait(lambda said: any(isinstance(word, PeerDown) for word in said))
        assert [word.peer for word in prefill.said if isinstance(word, PeerDown)] == [PeerRank(decode.me, 0)]
        # What is computed then goes nowhere, and the transfer hears of it.
        prefill.compute(1, range(11, TOKENS), blocks, what)
        prefill.wait(lambda said: any(isinstance(word, RankBroken) for word in said))
        prefill.shut(transfer)
        later = Replica("decode-0", decode.layout, incarnation=4, kinds=(kind,))
        with closing(later.ranks):
            later.open_receive(transfer, prefill.layout, range(TOKENS), blocks, generation=2)
            prefill.open_send(1, later, range(TOKENS), blocks, generation=2)
            later.wait_all(RankDone, transfer)
            assert later.caches[0].holds(range(TOKENS), blocks, what)
            # A grant of the earlier life that comes late: another life answers there.
            stale = prefill.send_order(2, decode, range(TOKENS), blocks)
            there = KvTarget(layout=later.layout, ends=later.ranks.ends)
            prefill.compute(2, range(TOKENS), blocks, what)
            prefill.ranks.give(OpenSend(grant=stale.grant, target=there))
            prefill.wait(lambda said: any(isinstance(word, RankBroken) and word.transfer.number == 2 for word in said))
            assert prefill.said[-1] == RankBroken(
                transfer=prefill.transfer(2), generation=1, rank=0, ending=Ending.PEER_RESTARTED
            )


def test_a_sender_dies(seed: int) -> None:
    with pair() as (prefill, decode):
        transfer, blocks = prefill.transfer(1), blocks_for(decode.layout, seed)
        decode.open_receive(transfer, prefill.layout, range(TOKENS), blocks)
        prefill.open_send(1, decode, range(TOKENS), blocks)
        what = prompt(prefill.layout, TOKENS, seed)
        prefill.compute(1, range(11), blocks, what)
        wait_until(lambda: decode.caches[0].holds(range(11), blocks, what))
        prefill.ranks.close()
        decode.wait(lambda said: any(isinstance(word, PeerDown) for word in said))
        decode.shut(transfer)
        assert not any(isinstance(word, RankDone) for word in decode.said)


def test_many_transfers_at_once(seed: int) -> None:
    with pair(layout_with(tp=2), limits=replace(LIMITS, max_queued_bytes=600)) as (prefill, decode):
        numbers = range(1, 6)
        whats = {number: prompt(prefill.layout, 16, seed + number) for number in numbers}
        blocks = {number: list(range(4 * (number - 1), 4 * number)) for number in numbers}
        for number in numbers:
            decode.open_receive(prefill.transfer(number), prefill.layout, range(16), blocks[number])
            prefill.open_send(number, decode, range(16), blocks[number])
        for kv, cache in zip(prefill.kv, prefill.caches, strict=True):
            kv.begin_step(list(numbers), [blocks[number] for number in numbers], [16] * len(numbers))
            for number in numbers:
                for layer in range(len(cache.layers)):
                    cache.write(layer, range(16), blocks[number], whats[number])
            kv.end_step()
        for number in numbers:
            decode.wait_all(RankDone, prefill.transfer(number))
            prefill.wait_all(RankDone, prefill.transfer(number))
            assert decode.caches[0].holds(range(16), blocks[number], whats[number])
            prefill.shut(prefill.transfer(number))
            decode.shut(prefill.transfer(number))
        assert sum(isinstance(word, Drained) for word in decode.said) == len(numbers)


def test_nothing_stays_after_closing(seed: int) -> None:
    before = {thread.name for thread in threading.enumerate()}
    with pair(kinds=("shm", "tcp")) as (prefill, decode):
        send_all(prefill, decode, seed)
        paths = [end.address for replica in (prefill, decode) for end in replica.ranks.ends[0] if end.kind == "shm"]
    assert {thread.name for thread in threading.enumerate()} <= before
    for path in paths:
        with socket.socket(socket.AF_UNIX) as sock, pytest.raises(FileNotFoundError):
            sock.connect(path.removeprefix("unix:"))
    prefill.ranks.close()
    prefill.ranks.check()


def test_an_address_that_others_cannot_reach_is_refused() -> None:
    layout = KvLayout(layers=3, kv_heads=4, block_size=4)
    share = replace(share_of("prefill-0", 1, ("tcp",)), across_hosts=True)
    cache = Cache.blank(layout, 0)
    with pytest.raises(CommMisuse, match="from other hosts"):
        RankKv(
            share,
            KvSeat(address="127.0.0.1", secret=SECRET),
            rank=0,
            layout=layout,
            cache=cache.layers,
            clock=monotonic_clock,
        )


def test_it_is_what_an_executor_tells() -> None:
    with pair(limits=KvLimits()) as (prefill, _):
        kv: StepKv = prefill.kv[0]
        kv.begin_step([], [], [])
        kv.layer_done(0)
        kv.end_step()
        prefill.ranks.check()
