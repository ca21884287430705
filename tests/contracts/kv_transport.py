"""The contract of ``KvTransport``, as tests: an implementation's test module subclasses this and brings a ``join``.

A bed has two ranks, one of each replica, with memory whose every byte is known. Waits look again until what is waited
for is there, and give up in the end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from slipstream.comm.errors import CommMisuse
from slipstream.comm.kv.frame import KvFrame
from slipstream.comm.kv.incoming import Drop, Incoming
from slipstream.comm.kv.layout import KvOffer
from slipstream.comm.kv.outgoing import Outgoing, Post
from slipstream.comm.kv.transfer import (
    OpenReceiving,
    OpenSending,
    Peer,
    PeerRank,
    RankDone,
    Report,
    TransferId,
)
from slipstream.comm.kv.transport import Event, KvTransport, LockedGate, PeerDown, Released, Written
from slipstream.placement.kv_routes import KvLayout
from slipstream.runtime.clock import monotonic_clock
from slipstream.tests.comm.kv.kv_bytes import UNTOUCHED, RankKv, truth

PATIENCE_S = 30.0
ROW_BYTES = 8
NUM_BLOCKS = 40


@dataclass
class End:
    """One rank."""

    kv: RankKv
    gate: LockedGate
    offer: KvOffer
    me: PeerRank
    transport: KvTransport | None = None
    events: list[Event] = field(default_factory=list)

    @property
    def the(self) -> KvTransport:
        assert self.transport is not None
        return self.transport

    def look(self) -> list[Event]:
        """Take in what happened, and return all of it so far."""
        self.events += self.the.poll(0.01)
        return self.events

    def released(self) -> list[Released]:
        return [event for event in self.look() if isinstance(event, Released)]

    def written(self) -> list[Written]:
        return [event for event in self.look() if isinstance(event, Written)]

    def reports(self) -> list[Report]:
        with self.gate.lock:
            return self.gate.incoming.take_reports()


def end_of(
    replica: str,
    layout: KvLayout,
    rank: int,
    *,
    row_bytes: int = ROW_BYTES,
    num_blocks: int = NUM_BLOCKS,
    parts: int = 2,
) -> End:
    """Return a rank without a transport."""
    peer = Peer(replica, 3)
    offer = KvOffer(
        replica=replica,
        incarnation=3,
        rank=rank,
        layout=layout,
        model="m",
        dtype="uint8",
        head_dim=row_bytes,
        parts=parts,
    )
    incoming = Incoming(rank=rank, incarnation=3, layout=layout, num_blocks=num_blocks, entry_bytes=parts * row_bytes)
    kv = RankKv(layout, rank, num_blocks=num_blocks, row_bytes=row_bytes, parts=parts)
    return End(kv, LockedGate(incoming), offer, PeerRank(peer, rank))


@dataclass
class Bed:
    """Two ranks that are connected."""

    source: End
    target: End
    to: PeerRank

    def wait(self, check: Callable[[], bool], what: str) -> None:
        """Look until it is so. Raises: AssertionError when it does not become so"""
        give_up_s = monotonic_clock() + PATIENCE_S
        while not check():
            assert monotonic_clock() < give_up_s, f"this does not become so: {what}"
            self.source.look()
            self.target.look()

    def open(self, number: int, tokens: range, source_blocks: list[int], target_blocks: list[int]) -> list[Post]:
        """Grant a transfer whose prompt is all computed, and return what there is to post."""
        transfer = TransferId(self.source.me.peer.replica, 3, number)
        blocks = tuple(target_blocks)
        grant = OpenReceiving(transfer=transfer, generation=1, tokens=tokens, blocks=blocks)
        with self.target.gate.lock:
            self.target.gate.incoming.open(grant, self.source.offer.layout)
        outgoing = Outgoing(
            rank=self.source.me.rank,
            layout=self.source.offer.layout,
            entry_bytes=self.source.kv.memory.shape.entry_bytes,
            max_frame_bytes=600,
        )
        outgoing.track(transfer)
        outgoing.add_blocks(transfer, source_blocks)
        for layer in self.source.kv.layers:
            outgoing.computed(transfer, layer, tokens.stop)
        to = self.to.peer
        outgoing.open(
            OpenSending(transfer=transfer, generation=1, to=to, tokens=tokens, blocks=blocks), self.target.offer.layout
        )
        posts = []
        while (post := outgoing.next_post()) is not None:
            outgoing.posted()
            if post.to == self.to:
                posts.append(post)
        return posts

    def post_all(self, posts: list[Post]) -> None:
        """Post everything, as fast as it is taken."""
        for post in posts:
            self.wait(lambda post=post: self.source.the.post(post), "a frame is taken")  # type: ignore[misc]


class KvTransportContract(ABC):
    """What holds of every transport."""

    @abstractmethod
    def join(self, stack: ExitStack, source: End, target: End, *, max_queued_bytes: int) -> PeerRank:
        """Give both ends transports with their memory, connect the source to the target, and say by what name."""

    @contextmanager
    def bed(
        self,
        source: KvLayout | None = None,
        target: KvLayout | None = None,
        *,
        ranks: tuple[int, int] = (0, 0),
        max_queued_bytes: int = 1 << 30,
        row_bytes: int = ROW_BYTES,
        num_blocks: int = NUM_BLOCKS,
    ) -> Iterator[Bed]:
        plain = KvLayout(layers=2, kv_heads=2, block_size=4)
        sender, receiver = (
            end_of(name, layout or plain, rank, row_bytes=row_bytes, num_blocks=num_blocks)
            for name, layout, rank in zip(("prefill-0", "decode-0"), (source, target), ranks, strict=True)
        )
        with ExitStack() as stack:
            to = self.join(stack, sender, receiver, max_queued_bytes=max_queued_bytes)
            yield Bed(sender, receiver, to)

    @pytest.mark.parametrize(
        ("source", "target", "ranks"),
        [
            ({}, {}, (0, 0)),
            ({"block_size": 3}, {"block_size": 5}, (0, 0)),
            ({"block_size": 16}, {"block_size": 4}, (0, 0)),
            ({"tp": 2}, {}, (1, 0)),
            ({}, {"tp": 4}, (0, 3)),
            ({"tp": 8}, {"tp": 2, "pp": 3}, (4, 3)),
        ],
    )
    def test_every_byte_comes_to_its_place_and_no_other(
        self, source: dict[str, int], target: dict[str, int], ranks: tuple[int, int], seed: int
    ) -> None:
        plain = KvLayout(layers=3, kv_heads=4, block_size=4)
        source_layout, target_layout = replace(plain, **source), replace(plain, **target)
        draw = np.random.default_rng(seed)
        with self.bed(source_layout, target_layout, ranks=ranks) as bed:
            tokens, first = 37, 6
            what = truth(plain, tokens, ROW_BYTES, seed)
            source_blocks, target_blocks = (
                draw.permutation(NUM_BLOCKS)[: -(-tokens // layout.block_size)].tolist()
                for layout in (source_layout, target_layout)
            )
            for layer in bed.source.kv.layers:
                bed.source.kv.write(layer, range(tokens), source_blocks, what)
            posts = bed.open(1, range(first, tokens), source_blocks, target_blocks)
            assert posts
            bed.post_all(posts)
            bed.wait(lambda: len(bed.target.written()) == len(posts), "all frames are written")
            bed.wait(lambda: len(bed.source.released()) == len(posts), "all frames are released")
            self._check_places(bed, posts, target_blocks, what)

    def _check_places(self, bed: Bed, posts: list[Post], blocks: list[int], what: np.ndarray) -> None:
        kv = bed.target.kv
        expected = np.full_like(kv.array, UNTOUCHED)
        image = RankKv(kv.layout, bed.target.me.rank, num_blocks=NUM_BLOCKS, row_bytes=ROW_BYTES)
        for post in posts:
            frame = post.frame
            image.write(frame.layer, frame.tokens, blocks, what)
            layer, heads = frame.layer - kv.layers.start, [head - kv.heads.start for head in frame.heads]
            for token in frame.tokens:
                at = (layer, slice(None), blocks[token // kv.layout.block_size], heads, token % kv.layout.block_size)
                expected[at] = image.array[at]
        assert np.array_equal(kv.array, expected)

    def test_frames_of_many_runs(self, seed: int) -> None:
        """More runs than a system call takes, and frames larger than what crosses at once."""
        source = KvLayout(layers=1, kv_heads=4, block_size=2, tp=2)
        target = KvLayout(layers=1, kv_heads=4, block_size=2)
        blocks = 3000
        with self.bed(source, target, row_bytes=64, num_blocks=blocks) as bed:
            what = truth(source, 2 * blocks, 64, seed)
            order = np.random.default_rng(seed).permutation(blocks).tolist()
            bed.source.kv.write(0, range(2 * blocks), order, what)
            transfer = TransferId("prefill-0", 3, 1)
            grant = OpenReceiving(transfer=transfer, generation=1, tokens=range(2 * blocks), blocks=tuple(order))
            with bed.target.gate.lock:
                bed.target.gate.incoming.open(grant, source)
            frame = KvFrame(
                transfer=transfer,
                generation=1,
                receiver=3,
                layer=0,
                first_head=0,
                num_heads=2,
                first_token=0,
                num_tokens=2 * blocks,
            )
            bed.post_all([Post(frame=frame, to=bed.to, blocks=order, block_sizes=(2, 2))])
            bed.wait(lambda: len(bed.target.written()) == 1, "the frame is written")
            found = bed.target.kv.read(0, range(2 * blocks), order)
            assert np.array_equal(found[:, :2], what[0, :, :2])
            assert (found[:, 2:] == UNTOUCHED).all()

    def test_the_gate_is_asked_first(self, seed: int) -> None:
        """What it refuses is not stored, and does not hold up the rest."""
        with self.bed() as bed:
            blocks = [3, 5]
            what = truth(bed.source.offer.layout, 8, ROW_BYTES, seed)
            for layer in range(2):
                bed.source.kv.write(layer, range(8), blocks, what)
            posts = bed.open(1, range(8), blocks, blocks)
            frame = posts[0].frame
            strange = [
                replace(frame, transfer=TransferId("prefill-0", 3, 9)),
                replace(frame, transfer=TransferId("prefill-0", 2, 1)),
                replace(frame, generation=0),
                replace(frame, receiver=2),
            ]
            refused = [replace(posts[0], frame=each) for each in strange]
            bed.post_all([*refused, *posts])
            bed.wait(lambda: len(bed.target.written()) == len(posts), "the others are written")
            bed.wait(lambda: len(bed.source.released()) == len(posts) + len(refused), "all are released")
            assert all(event.sent for event in bed.source.released())
            assert bed.target.kv.holds(range(8), blocks, what)
            dropped = bed.target.gate.incoming.dropped
            assert dropped == {Drop.UNKNOWN: 1, Drop.FOREIGN: 1, Drop.STALE: 2}
            assert [report for report in bed.target.reports() if isinstance(report, RankDone)]

    def test_a_frame_that_comes_twice_is_written_once(self, seed: int) -> None:
        with self.bed() as bed:
            what = truth(bed.source.offer.layout, 4, ROW_BYTES, seed)
            bed.source.kv.write(0, range(4), [1], what)
            posts = bed.open(1, range(4), [1], [2])
            bed.post_all([posts[0], posts[0], posts[0]])
            bed.wait(lambda: len(bed.source.released()) == 3, "all are released")
            bed.wait(lambda: bed.target.gate.incoming.dropped[Drop.DUPLICATE] == 2, "two are dropped")
            assert len(bed.target.written()) == 1

    def test_too_much_is_not_taken(self, seed: int) -> None:
        with self.bed(max_queued_bytes=1000) as bed:
            posts = bed.open(1, range(100), list(range(25)), list(range(25)))
            bed.post_all(posts)
            bed.wait(lambda: len(bed.source.released()) == len(posts), "all are released")
            bed.wait(lambda: len(bed.target.written()) == len(posts), "all are written")

    def test_a_frame_to_nobody_is_released_unsent(self) -> None:
        with self.bed() as bed:
            post = bed.open(1, range(4), [0], [0])[0]
            for peer in (Peer("decode-9", 3), Peer("decode-0", 4)):
                assert bed.source.the.post(replace(post, to=PeerRank(peer, 0)))
            bed.wait(lambda: len(bed.source.released()) == 2, "both are released")
            assert not any(event.sent for event in bed.source.released())

    def test_what_is_cancelled_is_released(self) -> None:
        with self.bed() as bed:
            first = bed.open(1, range(100), list(range(25)), list(range(25)))
            second = bed.open(2, range(4), [26], [26])
            posted = sum(bed.source.the.post(post) for post in first)
            assert posted == len(first)
            bed.source.the.cancel(first[0].frame.transfer)
            bed.post_all(second)
            count = len(first) + len(second)
            bed.wait(lambda: len(bed.source.released()) == count, "all are released")
            bed.wait(lambda: len(bed.target.written()) >= len(second), "the other transfer is written")
            theirs = [event for event in bed.source.released() if event.frame.transfer == second[0].frame.transfer]
            assert len(theirs) == len(second) and all(event.sent for event in theirs)

    def test_a_peer_that_ends_is_seen(self) -> None:
        with self.bed() as bed:
            posts = bed.open(1, range(8), [0, 1], [0, 1])
            bed.target.the.close()
            bed.wait(lambda: any(isinstance(event, PeerDown) for event in bed.source.look()), "the end is seen")
            assert [event.peer for event in bed.source.events if isinstance(event, PeerDown)] == [bed.to]
            bed.post_all(posts)
            bed.wait(lambda: len(bed.source.released()) == len(posts), "all are released")
            assert not any(event.sent for event in bed.source.released())

    def test_a_sender_that_ends_is_seen(self) -> None:
        with self.bed() as bed:
            posts = bed.open(1, range(4), [0], [0])
            bed.post_all(posts[:1])
            bed.wait(lambda: len(bed.target.written()) == 1, "a frame is written")
            bed.source.the.close()
            bed.wait(lambda: any(isinstance(event, PeerDown) for event in bed.target.look()), "the end is seen")
            assert [event.peer for event in bed.target.events if isinstance(event, PeerDown)] == [bed.source.me]

    def test_closing_releases_everything_and_may_be_repeated(self) -> None:
        with self.bed() as bed:
            posts = bed.open(1, range(100), list(range(25)), list(range(25)))
            taken = sum(bed.source.the.post(post) for post in posts)
            bed.source.the.close()
            bed.source.the.close()
            assert len(bed.source.released()) == taken
            bed.target.the.close()
            with bed.target.gate.lock:
                bed.target.gate.incoming.close(posts[0].frame.transfer, 1)
            drained = [report for report in bed.target.reports() if type(report).__name__ == "Drained"]
            assert len(drained) == 1, "no write is under way"

    def test_memory_is_registered_once(self) -> None:
        with self.bed() as bed, pytest.raises(CommMisuse, match="has its memory already"):
            bed.source.the.register(bed.source.kv.memory)
