"""A receiver that reads its sender's memory: what it believes, and what becomes of a sender that gives up."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from struct import pack

import numpy as np
import pytest

from slipstream.comm.kv.channel import StreamLimits
from slipstream.comm.kv.checksum import frame_checksum
from slipstream.comm.kv.direct import DirectReceiver, probe
from slipstream.comm.kv.frame import KvFrame, KvHeader, pack_header
from slipstream.comm.kv.incoming import Drop, Outcome, Write
from slipstream.comm.kv.meeting import meet_receiver
from slipstream.comm.kv.memory import Runs, address_of
from slipstream.comm.kv.places import MAX_SPANS, paired
from slipstream.comm.kv.ring import RingReceiver
from slipstream.comm.kv.shm import Shm
from slipstream.comm.kv.transfer import OpenReceiving, PeerRank, TransferId
from slipstream.comm.kv.transport import LockedGate
from slipstream.comm.sockets import connect
from slipstream.comm.wire import Deadline
from slipstream.placement.kv_routes import KvLayout
from slipstream.runtime.clock import monotonic_clock
from slipstream.tests.comm.kv.kv_bytes import UNTOUCHED
from slipstream.tests.comm.kv.kv_ends import SECRET, give_transport
from slipstream.tests.contracts.kv_transport import PATIENCE_S, ROW_BYTES, End, end_of

LAYOUT = KvLayout(layers=2, kv_heads=2, block_size=4)
FRAME = KvFrame(
    transfer=TransferId("prefill-0", 3, 1),
    generation=1,
    receiver=3,
    layer=0,
    first_head=0,
    num_heads=2,
    first_token=0,
    num_tokens=4,
)
FRAME_BYTES = FRAME.payload_bytes(2 * ROW_BYTES)
BYTES = bytearray(range(FRAME_BYTES))


@contextmanager
def spoken_to(end: End) -> Iterator[socket.socket]:
    """Yield a socket to a receiver with the one grant, after both have met: it wants to know how to read."""
    with ExitStack() as stack:
        address = give_transport(stack, "shm", end).address
        with end.gate.lock:
            end.gate.incoming.open(
                OpenReceiving(transfer=FRAME.transfer, generation=1, tokens=range(4), blocks=(1,)), LAYOUT
            )
        sock = stack.enter_context(connect(address, timeout_s=PATIENCE_S))
        offer = end_of("prefill-0", LAYOUT, 0).offer
        meet_receiver(sock, offer, "decode-0", SECRET, Deadline(PATIENCE_S, monotonic_clock))
        sock.settimeout(PATIENCE_S)
        yield sock


@contextmanager
def reading(end: End) -> Iterator[socket.socket]:
    """As ``spoken_to``, and it has found that it can read this process."""
    with spoken_to(end) as sock:
        words, token = probe()
        sock.sendall(b"d" + words)
        assert sock.recv(1) == b"d" and token
        yield sock


def told(*places: tuple[int, int], count: int | None = None) -> bytes:
    """Return what a sender says of a frame."""
    checksum = frame_checksum(FRAME, [memoryview(BYTES)])
    spans = np.array(places, dtype=np.int64).tobytes()
    return pack_header(FRAME, FRAME_BYTES, checksum) + pack("!I", len(places) if count is None else count) + spans


def ended(end: End) -> Outcome:
    give_up_s = monotonic_clock() + PATIENCE_S
    while not end.written():
        assert monotonic_clock() < give_up_s
    return end.written()[0].outcome


def test_bytes_are_read_where_they_are() -> None:
    end, at = end_of("decode-0", LAYOUT, 0), address_of(memoryview(BYTES))
    with reading(end) as sock:
        sock.sendall(told((at, 3), (at + 3, FRAME_BYTES - 3)))
        assert sock.recv(1) == b"d", "the memory is the sender's again"
        assert ended(end) is Outcome.APPLIED
    assert end.kv.array[0, :, 1].tobytes() == bytes(BYTES)


@pytest.mark.parametrize(
    ("places", "count"),
    [
        ([(0, FRAME_BYTES - 1)], None),
        ([(0, FRAME_BYTES + 1)], None),
        ([(0, FRAME_BYTES), (0, 0)], None),
        ([(0, 2 * FRAME_BYTES), (0, -FRAME_BYTES)], None),
        ([], None),
        ([], MAX_SPANS + 1),
        ([(-(1 << 40), FRAME_BYTES)], "there is nothing"),
        ([(1 << 12, FRAME_BYTES)], "there is nothing"),
    ],
)
def test_places_are_not_believed(places: list[tuple[int, int]], count: int | str | None) -> None:
    """The write is lost, the connection ends, and no byte was stored."""
    end = end_of("decode-0", LAYOUT, 0)
    at = 0 if count == "there is nothing" else address_of(memoryview(BYTES))
    with reading(end) as sock:
        sock.sendall(
            told(*((at + where, size) for where, size in places), count=None if isinstance(count, str) else count)
        )
        assert ended(end) is Outcome.LOST
        assert sock.recv(1) == b""
    assert (end.kv.array == UNTOUCHED).all()


def test_class_3_a_sender_that_gave_up_meanwhile() -> None:
    """It ends the connection before it uses the memory again: what was read after that is not applied."""
    end, at = end_of("decode-0", LAYOUT, 0), address_of(memoryview(BYTES))

    class Slow(LockedGate):
        sock: socket.socket

        def admit(self, header: KvHeader, peer: PeerRank) -> Write | Drop:
            answer = super().admit(header, peer)
            self.sock.shutdown(socket.SHUT_RDWR)
            return answer

    end.gate = Slow(end.gate.incoming)
    with reading(end) as sock:
        end.gate.sock = sock
        sock.sendall(told((at, FRAME_BYTES)))
        assert ended(end) is Outcome.LOST


@pytest.mark.parametrize("how", ["the other does not want it", "it says what is not there", "there is no such call"])
def test_where_memory_cannot_be_read_there_is_a_ring(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    end = end_of("decode-0", LAYOUT, 0)
    words, token = probe()
    if how == "there is no such call":
        monkeypatch.setattr("slipstream.comm.kv.direct._read_call", None)
    if how == "it says what is not there":
        token[0] ^= 1
    with spoken_to(end) as sock:
        sock.sendall(b"r" if how == "the other does not want it" else b"d" + words)
        answer, descriptors, _, _ = socket.recv_fds(sock, 1, 1)
        assert answer == b"r"
        for descriptor in descriptors:
            os.close(descriptor)


@pytest.mark.parametrize(
    ("sender", "receiver", "kind"),
    [(True, True, DirectReceiver), (True, False, RingReceiver), (False, True, RingReceiver)],
)
def test_both_ends_come_to_the_same(sender: bool, receiver: bool, kind: type[DirectReceiver | RingReceiver]) -> None:
    """Whichever of them is told not to read directly."""
    here, there = socket.socketpair()
    made: list[DirectReceiver | RingReceiver] = []

    def receive() -> None:
        made.append(Shm(direct=receiver).channel_from(there, peer="it", limits=StreamLimits(), clock=monotonic_clock))

    thread = threading.Thread(target=receive)
    thread.start()
    sending = Shm(direct=sender).channel_to(here, peer="it", limits=StreamLimits(), clock=monotonic_clock)
    thread.join()
    assert type(made[0]) is kind and type(sending).__name__ == kind.__name__.replace("Receiver", "Sender")
    for channel in (sending, *made):
        channel.close()


def test_calls_are_cut_on_both_sides(seed: int) -> None:
    draw = np.random.default_rng(seed)
    for _ in range(50):
        total = int(draw.integers(1, 4000))
        sides = []
        for base in (0, 10_000):
            ends = np.unique(np.append(draw.integers(1, total + 1, int(draw.integers(0, 50))), total))
            lengths = np.diff(ends, prepend=0)
            at = base + np.cumsum(lengths + draw.integers(0, 3, len(lengths))) - lengths
            sides.append(np.stack((at, lengths), axis=1))
        portions = list(paired(sides[0], sides[1], 700))
        assert [sum(int(into[:, 1].sum()) for into, _ in calls) for calls in portions[:-1]] == [700] * (
            len(portions) - 1
        )
        pairs = [pair for calls in portions for pair in calls]
        assert all((into[:, 1] == out_of[:, 1]).all() for into, out_of in pairs)
        for side, spans in enumerate(sides):
            read = [byte for pair in pairs for at, size in pair[side].tolist() for byte in range(at, at + size)]
            assert read == [byte for at, size in spans.tolist() for byte in range(at, at + size)]


def test_runs_are_places() -> None:
    view = memoryview(bytearray(100))
    runs = Runs(view, address_of(view), np.array([3, 50]), np.array([4, 5]))
    assert runs.spans.tolist() == [[address_of(view) + 3, 4], [address_of(view) + 50, 5]]
    assert runs.num_bytes == 9 and [len(run) for run in runs] == [4, 5]
