"""KV connections from the first byte on: who may connect, what does not fit, who is hung, who comes again."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

import pytest

from slipstream.comm.errors import BadFrame, CommMisuse, CommTimeout, HandshakeRefused, KvMismatch, PeerLost
from slipstream.comm.frames import FrameKind
from slipstream.comm.kv.channel import StreamLimits
from slipstream.comm.kv.frame import KvFrame, KvHeader, pack_header
from slipstream.comm.kv.incoming import Drop, Outcome, Write
from slipstream.comm.kv.layout import KvOffer
from slipstream.comm.kv.meeting import meet_receiver
from slipstream.comm.kv.outgoing import Post
from slipstream.comm.kv.shm import Shm
from slipstream.comm.kv.streams import StreamTransport
from slipstream.comm.kv.tcp import Tcp
from slipstream.comm.kv.transfer import Drained, Ending, OpenReceiving, Peer, PeerRank, RankBroken, TransferId
from slipstream.comm.kv.transport import LockedGate, PeerDown, Written
from slipstream.comm.sockets import connect, listen
from slipstream.comm.wire import Deadline
from slipstream.placement.kv_routes import KvLayout
from slipstream.runtime.clock import monotonic_clock
from slipstream.tests.comm.kv.kv_ends import SECRET, give_transport, join
from slipstream.tests.contracts.kv_transport import PATIENCE_S, ROW_BYTES, Bed, End, end_of

LAYOUT = KvLayout(layers=2, kv_heads=2, block_size=4)
SOON_S = 0.3
TRANSFER = TransferId("prefill-0", 3, 1)
FRAME = KvFrame(
    transfer=TRANSFER,
    generation=1,
    receiver=3,
    layer=0,
    first_head=0,
    num_heads=2,
    first_token=0,
    num_tokens=4,
)
FRAME_BYTES = FRAME.payload_bytes(2 * ROW_BYTES)

both = pytest.mark.parametrize("kind", ["tcp", "shm"])


def source_end() -> End:
    return end_of("prefill-0", LAYOUT, 0)


def target_end() -> End:
    return end_of("decode-0", LAYOUT, 0)


def grant(target: End) -> None:
    """Let the one transfer in."""
    with target.gate.lock:
        target.gate.incoming.open(OpenReceiving(transfer=TRANSFER, generation=1, tokens=range(4), blocks=(1,)), LAYOUT)


def by_hand(address: str, offer: KvOffer) -> socket.socket:
    """Do a sender's part of the meeting, and return the socket, on which anything may then be sent."""
    sock = connect(address, timeout_s=PATIENCE_S)
    meet_receiver(sock, offer, "decode-0", SECRET, Deadline(PATIENCE_S, monotonic_clock))
    sock.settimeout(PATIENCE_S)
    return sock


@contextmanager
def listening(kind: str = "tcp", *, limits: StreamLimits | None = None) -> Iterator[tuple[End, str]]:
    """Yield a target with its transport, and where it listens."""
    with ExitStack() as stack:
        end = target_end()
        yield end, give_transport(stack, kind, end, limits=limits).address


def wait(end: End, check: Callable[[], bool]) -> None:
    give_up_s = monotonic_clock() + PATIENCE_S
    while not check():
        assert monotonic_clock() < give_up_s
        end.look()


# ------------------------------------------------------------------ who may


@both
def test_a_stranger_without_the_secret_is_refused(kind: str) -> None:
    with ExitStack() as stack, listening(kind) as (_, address):
        stranger = give_transport(stack, kind, source_end(), secret=b"another cluster's secret")
        with pytest.raises(HandshakeRefused, match=r"KV to 'decode-0' at .*the secret is not"):
            stranger.connect(address, "decode-0", timeout_s=PATIENCE_S)


def test_who_looks_for_another_replica_is_refused() -> None:
    """An address that now belongs to another replica of the same cluster."""
    with ExitStack() as stack, listening() as (_, address):
        sender = give_transport(stack, "tcp", source_end())
        with pytest.raises(HandshakeRefused, match="this is replica 'kv/decode-0', not 'kv/decode-7'"):
            sender.connect(address, "decode-7", timeout_s=PATIENCE_S)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": "other"}, "model is 'm' here and 'other' there"),
        ({"dtype": "bfloat16"}, "dtype is 'uint8' here and 'bfloat16' there"),
        ({"head_dim": 64}, "head_dim is 8 here and 64 there"),
        ({"checksum": "none"}, "checksum is 'xxh3' here and 'none' there"),
        ({"parts": 1}, "parts is 2 here and 1 there"),
        ({"protocol": 3}, "protocol is 2 here and 3 there"),
        ({"layout": replace(LAYOUT, layers=3)}, "layers is 2 here and 3 there"),
        ({"layout": replace(LAYOUT, kv_heads=4)}, "kv_heads is 2 here and 4 there"),
        ({"rank": 1}, "rank 1 is none of the 1 ranks there"),
    ],
)
def test_class_10_what_does_not_fit_is_refused_by_name(change: dict[str, object], text: str) -> None:
    """At the first meeting; both sides are told, and it is the receiver that says so."""
    with listening() as (_, address):
        sock = connect(address, timeout_s=PATIENCE_S)
        offer = replace(source_end().offer, **change)  # type: ignore[arg-type] # fields by name
        with pytest.raises(KvMismatch, match=text), sock:
            meet_receiver(sock, offer, "decode-0", SECRET, Deadline(PATIENCE_S, monotonic_clock))


def test_class_10_degrees_and_block_sizes_may_differ() -> None:
    with listening() as (_, address):
        offer = replace(source_end().offer, layout=replace(LAYOUT, tp=2, pp=2, block_size=7))
        by_hand(address, offer).close()


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"[" * 4000, b"x" * 5000, b'{"replica": 1}'],
)
def test_an_offer_is_not_believed(data: bytes) -> None:
    with pytest.raises(BadFrame, match="a KV offer"):
        KvOffer.decode(data)


def test_every_field_of_an_offer_is_checked() -> None:
    offer = source_end().offer
    assert KvOffer.decode(offer.encode()) == offer
    for before, after in [
        (b'"rank": 0', b'"rank": -1'),
        (b'"rank": 0', b'"rank": "0"'),
        (b'"rank": 0', b'"rank": true'),
        (b'"rank": 0', b'"rank": 0, "more": 1'),
        (b'"tp": 1', b'"tp": 0'),
        (b'"tp": 1', b'"tp": 1000000000'),
        (b'"incarnation": 3', b'"incarnation": 99999999999999999999'),
    ]:
        assert before in offer.encode()
        with pytest.raises(BadFrame):
            KvOffer.decode(offer.encode().replace(before, after))


# ------------------------------------------------------------------ who is hung


@both
def test_class_16_strangers_who_say_nothing_hold_nobody_up(kind: str) -> None:
    limits = StreamLimits(max_strangers=2, meeting_timeout_s=SOON_S)
    with ExitStack() as stack, listening(kind, limits=limits) as (_, address):
        silent = [stack.enter_context(connect(address, timeout_s=PATIENCE_S)) for _ in range(4)]
        sender = give_transport(stack, kind, source_end())
        assert sender.connect(address, "decode-0", timeout_s=PATIENCE_S) == target_end().me
        for sock in silent:
            sock.settimeout(PATIENCE_S)
            # Each is put out in the end: the challenge comes, then nothing.
            with suppress(ConnectionError):
                while sock.recv(4096):
                    continue


def test_class_16_a_listener_that_says_nothing() -> None:
    sock, address = listen("127.0.0.1:0")
    with ExitStack() as stack, sock:
        sender = give_transport(stack, "tcp", source_end())
        with pytest.raises(CommTimeout, match="says nothing"):
            sender.connect(address, "decode-0", timeout_s=SOON_S)


@both
def test_class_16_a_peer_that_stops_reading(kind: str) -> None:
    """It still holds its connections; the sender's frames come back in time, and it is told who."""
    limits = StreamLimits(frame_timeout_s=SOON_S, ring_bytes=1 << 16)
    hold = threading.Event()

    class Hung(LockedGate):
        def admit(self, header: KvHeader, peer: PeerRank) -> Write | Drop:
            hold.wait(PATIENCE_S)
            return super().admit(header, peer)

    with ExitStack() as stack:
        source, target = source_end(), target_end()
        target.gate = Hung(target.gate.incoming)
        to = join(stack, kind, source, target, limits=limits)
        stack.callback(hold.set)
        bed = Bed(source, target, to)
        blocks = list(range(40))
        large = replace(FRAME, num_tokens=160)
        post = Post(frame=large, to=to, blocks=blocks, block_sizes=(4, 4))
        count = 4000
        for _ in range(count):
            assert source.the.post(post)
        bed.wait(lambda: len(source.released()) == count, "all are released")
        downs = [event for event in source.events if isinstance(event, PeerDown)]
        assert [event.peer for event in downs] == [to]
        assert "rank 0 of 'decode-0'" in downs[0].why


@both
def test_class_2_a_sender_that_stops_within_a_frame(kind: str) -> None:
    """Its connection lives; the write ends in time, and the blocks are nobody's any more."""
    with listening(kind, limits=StreamLimits(frame_timeout_s=SOON_S)) as (end, address):
        grant(end)
        with by_hand(address, source_end().offer) as sock:
            if kind == "shm":
                sock.sendall(b"r")
                assert sock.recv(1) == b"r"
            sock.sendall(pack_header(FRAME, FRAME_BYTES, 0))
            if kind == "tcp":
                sock.sendall(b"half of it")
            wait(end, lambda: bool(end.written()))
        check_lost(end)


@both
def test_class_2_a_sender_that_dies_within_a_frame(kind: str) -> None:
    with listening(kind) as (end, address):
        grant(end)
        with by_hand(address, source_end().offer) as sock:
            if kind == "shm":
                sock.sendall(b"r")
                assert sock.recv(1) == b"r"
            sock.sendall(pack_header(FRAME, FRAME_BYTES, 0) + (b"half of it" if kind == "tcp" else b""))
        wait(end, lambda: bool(end.written()))
        check_lost(end)


def check_lost(end: End) -> None:
    assert end.written() == [Written(FRAME, Outcome.LOST)]
    with end.gate.lock:
        end.gate.incoming.close(TRANSFER, 1)
    broken = RankBroken(transfer=TRANSFER, generation=1, rank=0, ending=Ending.PEER_LOST)
    assert end.reports()[1:] == [broken, Drained(transfer=TRANSFER, generation=1, rank=0)]
    wait(end, lambda: any(isinstance(event, PeerDown) for event in end.events))


# ------------------------------------------------------------------ what comes


def test_class_15_bytes_that_changed_on_the_way_are_not_applied() -> None:
    with listening() as (end, address):
        grant(end)
        with by_hand(address, source_end().offer) as sock:
            sock.sendall(pack_header(FRAME, FRAME_BYTES, 12345) + bytes(FRAME_BYTES))
            wait(end, lambda: bool(end.written()))
            assert end.written() == [Written(FRAME, Outcome.BAD_CHECKSUM)]
            broken = RankBroken(transfer=TRANSFER, generation=1, rank=0, ending=Ending.BAD_CHECKSUM)
            assert end.reports()[1:] == [broken]


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: somewhere\r\nUser-Agent: anything that is longer than a header\r\n\r\n",
        pack_header(FRAME, 1 << 31, 0),
        FrameKind.STEP.name.encode() * 40,
    ],
)
def test_what_is_no_frame_ends_the_connection(data: bytes) -> None:
    with listening() as (end, address), by_hand(address, source_end().offer) as sock:
        sock.sendall(data)
        with suppress(ConnectionError):
            assert sock.recv(1) == b""
        wait(end, lambda: any(isinstance(event, PeerDown) for event in end.look()))


def test_a_frame_that_says_another_size_than_it_has_is_read_over() -> None:
    with listening() as (end, address):
        grant(end)
        with by_hand(address, source_end().offer) as sock:
            sock.sendall(pack_header(FRAME, FRAME_BYTES + 8, 0) + bytes(FRAME_BYTES + 8))
            sock.sendall(pack_header(replace(FRAME, generation=0), 100_000, 0) + bytes(100_000))
            wait(end, lambda: end.gate.incoming.dropped.total() == 2)
            assert not end.written()
            broken = RankBroken(transfer=TRANSFER, generation=1, rank=0, ending=Ending.BAD_FRAME)
            assert end.reports()[1:] == [broken]


# ------------------------------------------------------------------ who comes again


@both
def test_class_9_a_receiver_that_restarts_at_the_same_address(kind: str) -> None:
    with ExitStack() as stack:
        source, target = source_end(), target_end()
        old = give_transport(stack, kind, target)
        sender = give_transport(stack, kind, source)
        first = sender.connect(old.address, "decode-0", timeout_s=PATIENCE_S)
        assert sender.connect(old.address, "decode-0", timeout_s=PATIENCE_S) == first, "it is connected already"
        old.close()
        wait(source, lambda: PeerDown in map(type, source.look()))
        later = target_end()
        later.offer = replace(later.offer, incarnation=4)
        give_transport(stack, kind, later, address=old.address)
        second = sender.connect(old.address, "decode-0", timeout_s=PATIENCE_S)
        assert (first.peer, second.peer) == (Peer("decode-0", 3), Peer("decode-0", 4))
        # What was meant for the earlier life goes nowhere.
        assert sender.post(Post(frame=FRAME, to=first, blocks=[0], block_sizes=(4, 4)))
        wait(source, lambda: bool(source.released()))
        assert not source.released()[0].sent


@both
def test_connecting_again_leaves_what_is_there(kind: str) -> None:
    with ExitStack() as stack:
        source, target = source_end(), target_end()
        to = join(stack, kind, source, target)
        address = target.the.address if isinstance(target.the, StreamTransport) else ""
        assert isinstance(source.the, StreamTransport)
        for _ in range(5):
            assert source.the.connect(address, "decode-0", timeout_s=PATIENCE_S) == to
        bed = Bed(source, target, to)
        posts = bed.open(1, range(4), [0], [0])
        bed.post_all(posts)
        bed.wait(lambda: len(target.written()) == len(posts), "all frames are written")
        assert not any(isinstance(event, PeerDown) for event in source.look() + target.look())


def test_class_9_a_sender_that_restarts_ends_its_earlier_connections() -> None:
    with listening() as (end, address):
        first = by_hand(address, source_end().offer)
        second = by_hand(address, replace(source_end().offer, incarnation=4))
        with first, second:
            assert first.recv(1) == b""
            wait(
                end,
                lambda: (
                    PeerDown(PeerRank(Peer("prefill-0", 3), 0), "")
                    in [replace(event, why="") for event in end.look() if isinstance(event, PeerDown)]
                ),
            )
            # The earlier life comes once more: it is not let in.
            stale = by_hand(address, source_end().offer)
            with stale:
                assert stale.recv(1) == b""


# ------------------------------------------------------------------ addresses and memory


def test_class_13_port_0_becomes_a_port() -> None:
    with listening() as (_, address):
        assert int(address.rpartition(":")[2]) > 0


def test_class_13_addresses_that_mean_nothing_elsewhere_are_not_told() -> None:
    tcp, shm = Tcp(), Shm()
    for address in ("127.0.0.1:5", "localhost:5", "[::1]:5"):
        tcp.check_address(address, across_hosts=False)
        with pytest.raises(CommMisuse, match="from other hosts"):
            tcp.check_address(address, across_hosts=True)
    for address in ("0.0.0.0:5", "[::]:5"):
        with pytest.raises(CommMisuse, match="give the address by which other hosts know this one"):
            tcp.check_address(address, across_hosts=False)
    tcp.check_address("10.0.0.3:5", across_hosts=True)
    tcp.check_address("node-7.cluster:5", across_hosts=True)
    shm.check_address("unix:/run/kv", across_hosts=False)
    for address, across_hosts in (("unix:/run/kv", True), ("127.0.0.1:5", False)):
        with pytest.raises(CommMisuse, match="shared memory"):
            shm.check_address(address, across_hosts=across_hosts)
    with ExitStack() as stack, pytest.raises(CommMisuse, match="cannot be received at 0"):
        give_transport(stack, "tcp", target_end(), address="0.0.0.0:0")


def test_class_11_memory_has_to_be_what_was_offered() -> None:
    with ExitStack() as stack:
        end = target_end()
        end.offer = replace(end.offer, layout=replace(LAYOUT, block_size=8))
        with pytest.raises(CommMisuse, match="memory with block_size 4 was registered where 8 is offered"):
            give_transport(stack, "tcp", end)
        with pytest.raises(CommMisuse, match="has no memory"):
            assert end.transport is not None
            end.transport.post(Post(frame=FRAME, to=end.me, blocks=[0], block_sizes=(4, 4)))


def test_a_frame_over_the_limit_is_not_taken() -> None:
    with ExitStack() as stack:
        sender = give_transport(stack, "tcp", source_end(), limits=StreamLimits(max_frame_bytes=FRAME_BYTES - 1))
        with pytest.raises(CommMisuse, match=f"a KV frame of {FRAME_BYTES} bytes is over the limit"):
            sender.post(Post(frame=FRAME, to=target_end().me, blocks=[0], block_sizes=(4, 4)))


def test_nobody_listens() -> None:
    with ExitStack() as stack:
        sender = give_transport(stack, "tcp", source_end())
        with pytest.raises(PeerLost, match=r"KV to 'decode-0' at 127\.0\.0\.1:1: cannot connect"):
            sender.connect("127.0.0.1:1", "decode-0", timeout_s=PATIENCE_S)
