"""Orders about KV over connections: they arrive, so do reports, and nobody waits for a rank that hangs or is gone."""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from slipstream.comm.errors import BadFrame, HandshakeRefused, PeerLost
from slipstream.comm.frames import FrameKind
from slipstream.comm.handshake import Identity, RankHandshake
from slipstream.comm.kv.transfer import Drained, RankDone, TransferId
from slipstream.comm.sockets import connect
from slipstream.comm.wire import Wire
from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.handoff.control import control_identity
from slipstream.runtime.handoff.rank_control import RankControl
from slipstream.runtime.handoff.rank_hub import KvHub
from slipstream.runtime.handoff.rank_kv import RankKv
from slipstream.runtime.handoff.rank_orders import CloseTransfer, encode_ends
from slipstream.runtime.handoff.ranks import BusKvRanks, KvRanks
from slipstream.sdk.errors import EngineError
from slipstream.tests.handoff.rank_beds import NUM_BLOCKS, PATIENCE_S, SECRET, Replica, layout_with, prompt, wait_until

IDENTITY = Identity(replica="decode-0", secret=SECRET)
TOKENS = 37


class Bus:
    """The hub of one replica, and its other ranks."""

    def __init__(self, stack: ExitStack, ranks: int, *, address: str = "") -> None:
        if not address:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="slip"))
            address = f"unix:{Path(folder) / 'kv'}"
        self.hub = KvHub(address, IDENTITY, ranks=range(1, ranks), clock=monotonic_clock)
        self.controls: list[RankControl] = []
        self._stack = stack
        stack.callback(self.hub.close)

    def join(self, kv: list[RankKv]) -> KvRanks:
        """Have all ranks but the first come over connections."""
        for one in kv[1:]:
            control = RankControl(self.hub.address, IDENTITY, one, timeout_s=PATIENCE_S, clock=monotonic_clock)
            self.controls.append(control)
            self._stack.callback(control.close)
            self._stack.callback(one.close)
        return BusKvRanks(kv[0], self.hub, timeout_s=PATIENCE_S)


@contextmanager
def decode_over(address: str = "", **degrees: int) -> Iterator[tuple[Replica, Bus]]:
    """Yield a replica whose other ranks are reached over connections."""
    layout = layout_with(**degrees)
    with ExitStack() as stack:
        bus = Bus(stack, layout.ranks, address=address)
        replica = Replica("decode-0", layout, join=bus.join)
        stack.callback(replica.ranks.close)
        yield replica, bus


@contextmanager
def alone(ranks: int = 2) -> Iterator[KvHub]:
    """Yield a hub whose ranks have not come."""
    with ExitStack() as stack:
        yield Bus(stack, ranks).hub


def by_hand(hub: KvHub, *, rank: int = 1) -> Wire:
    """Be a rank as far as the handshake."""
    wire = Wire(connect(hub.address, timeout_s=PATIENCE_S), peer="the driver", max_payload_bytes=1 << 20)
    handshake = RankHandshake(control_identity(IDENTITY), rank=rank)
    wire.send(FrameKind.HELLO, 0, handshake.hello(heard(wire, FrameKind.CHALLENGE)))
    return wire


def heard(wire: Wire, kind: FrameKind) -> bytes:
    """Return the next frame's payload; what is of another kind is read over."""
    found: list[bytes] = []

    def look() -> bool:
        wire.receive()
        while (frame := wire.take()) is not None:
            if frame.kind is kind:
                found.append(frame.payload)
        return bool(found)

    wait_until(look)
    return found[0]


@pytest.mark.parametrize("address", ["", "127.0.0.1:0"])
def test_orders_and_reports_come_through(address: str, seed: int) -> None:
    prefill = Replica("prefill-0", layout_with())
    with decode_over(address, tp=2, pp=2) as (decode, _):
        try:
            assert [len(ends) for ends in decode.ranks.ends] == [1, 1, 1, 1]
            what, blocks = prompt(prefill.layout, TOKENS, seed), list(range(10))
            transfer = prefill.transfer(1)
            decode.open_receive(transfer, prefill.layout, range(TOKENS), blocks)
            prefill.open_send(1, decode, range(TOKENS), blocks)
            prefill.compute(1, range(TOKENS), blocks, what)
            decode.wait_all(RankDone, transfer)
            assert all(cache.holds(range(TOKENS), blocks, what) for cache in decode.caches)
            decode.shut(transfer)
            assert decode.ranks.moved().bytes_in == what.nbytes
            moved = decode.ranks.moved_of(transfer)
            assert moved is not None and moved.bytes_in == what.nbytes
            decode.ranks.check()
        finally:
            prefill.ranks.close()


def test_a_rank_that_is_lost_is_an_error_of_the_replica() -> None:
    with decode_over(tp=2) as (decode, bus):
        bus.controls[0].close()
        wait_until(lambda: fails(decode.ranks))
        with pytest.raises(EngineError, match="the KV of rank 1 is out of reach: rank 1 is gone"):
            decode.ranks.check()
        # Orders go on being taken: whoever gives them looks at ``check`` in his own time.
        decode.ranks.give(CloseTransfer(transfer=decode.transfer(1), generation=1))


def test_a_rank_whose_kv_fails_is_an_error_of_the_replica() -> None:
    with decode_over(tp=2) as (decode, _):
        # A bug of ours: one transfer is opened twice.
        transfer = TransferId("prefill-0", 1, 1)
        order = decode.receive_order(transfer, decode.layout, range(4), [0])
        decode.kv[1].order(order)
        decode.kv[1].order(order)
        wait_until(lambda: fails(decode.ranks))
        with pytest.raises(EngineError, match="can move no more"):
            decode.kv[1].check()


def fails(ranks: KvRanks) -> bool:
    try:
        ranks.check()
    except EngineError:
        return True
    return False


def test_a_rank_that_does_not_come_is_named() -> None:
    with alone(ranks=3) as hub:
        wire = by_hand(hub, rank=2)
        wire.send(FrameKind.OFFER, 0, encode_ends(()))
        with pytest.raises(EngineError, match="rank 1 did not come to hear about KV within"):
            hub.wait_joined(0.2)
        wire.close()


def test_a_rank_that_does_not_read_holds_nobody_up(seed: int) -> None:
    """It is stopped: orders are taken all the same, and reach the others."""
    layout = layout_with(tp=2)
    with ExitStack() as stack:
        bus = Bus(stack, 2)
        stopped = by_hand(bus.hub)
        stack.callback(stopped.close)
        heard(stopped, FrameKind.WELCOME)
        stopped.send(FrameKind.OFFER, 0, encode_ends(()))

        def join(kv: list[RankKv]) -> KvRanks:
            stack.callback(kv[1].close)
            return BusKvRanks(kv[0], bus.hub, timeout_s=PATIENCE_S)

        decode = Replica("decode-0", layout, join=join)
        stack.callback(decode.ranks.close)
        for number in range(1, 400):
            transfer = TransferId("prefill-0", 1, number)
            decode.ranks.give(decode.receive_order(transfer, layout, range(4), list(range(1, NUM_BLOCKS)) * 100))
        last = TransferId("prefill-0", 1, 1)
        decode.ranks.give(CloseTransfer(transfer=last, generation=1))
        decode.wait(lambda said: any(isinstance(word, Drained) and word.transfer == last for word in said))
        decode.ranks.check()


def test_strangers_are_refused_and_hold_nobody_up(seed: int) -> None:
    with alone() as hub, ExitStack() as stack:
        for _ in range(70):
            stack.enter_context(connect(hub.address, timeout_s=PATIENCE_S))
        kv = Replica("decode-0", layout_with(tp=2))
        stack.callback(kv.ranks.close)
        with pytest.raises(HandshakeRefused, match="the secret is not the driver's"):
            RankControl(
                hub.address,
                Identity(replica="decode-0", secret=b"another cluster's secret"),
                kv.kv[1],
                timeout_s=PATIENCE_S,
                clock=monotonic_clock,
            )
        with pytest.raises(HandshakeRefused, match="rank 0 is none of those that are missing"):
            RankControl(hub.address, IDENTITY, kv.kv[0], timeout_s=PATIENCE_S, clock=monotonic_clock)
        control = RankControl(hub.address, IDENTITY, kv.kv[1], timeout_s=PATIENCE_S, clock=monotonic_clock)
        stack.callback(control.close)
        assert hub.wait_joined(PATIENCE_S) == {1: kv.kv[1].ends}


@pytest.mark.parametrize("frame", [(FrameKind.REPORT, b"\xc1"), (FrameKind.STEP, b""), (FrameKind.OFFER, b"\x90")])
def test_a_rank_that_says_what_it_may_not_is_lost(frame: tuple[FrameKind, bytes]) -> None:
    with alone() as hub:
        wire = by_hand(hub)
        heard(wire, FrameKind.WELCOME)
        wire.send(FrameKind.OFFER, 0, encode_ends(()))
        assert hub.wait_joined(PATIENCE_S) == {1: ()}
        with suppress(PeerLost):
            wire.send(frame[0], 0, frame[1])
        wait_until(lambda: hub_fails(hub))
        wire.close()


def hub_fails(hub: KvHub) -> bool:
    try:
        hub.check()
    except EngineError:
        return True
    return False


def test_a_driver_that_says_what_it_may_not_is_left(seed: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ExitStack() as stack:
        host, port = server.getsockname()
        kv = Replica("decode-0", layout_with(tp=2))
        stack.callback(kv.ranks.close)

        def speak() -> None:
            sock, _ = server.accept()
            with sock:
                sock.sendall(b"x" * 100)
                sock.recv(1)

        speaking = threading.Thread(target=speak)
        speaking.start()
        with pytest.raises(BadFrame):
            RankControl(f"{host}:{port}", IDENTITY, kv.kv[1], timeout_s=PATIENCE_S, clock=monotonic_clock)
        speaking.join()


def test_nothing_stays_after_closing() -> None:
    before = {thread.name for thread in threading.enumerate()}
    with decode_over(tp=2) as (_, bus):
        path = bus.hub.address.removeprefix("unix:")
        assert Path(path).exists()
    assert {thread.name for thread in threading.enumerate()} <= before
    assert not Path(path).exists()
    bus.hub.close()
