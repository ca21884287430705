"""Step buses for tests: addresses, hubs with their endpoints, and peers that speak the protocol by hand."""

from __future__ import annotations

import select
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slipstream.comm.frames import Frame, FrameKind
from slipstream.comm.handshake import DriverHandshake, Identity, RankHandshake
from slipstream.comm.sockets import connect, listen
from slipstream.comm.step_bus import StepHub
from slipstream.comm.step_endpoint import StepEndpoint, connect_rank
from slipstream.comm.step_listener import StepListener
from slipstream.comm.wire import BusLimits, Clock, Wire
from slipstream.runtime.clock import monotonic_clock

PATIENCE_S = 60.0
IDENTITY = Identity(replica="decode-0", secret=b"a secret of the cluster")
MAX_PAYLOAD_BYTES = 64 << 20


@contextmanager
def addresses(kind: str) -> Iterator[str]:
    """Yield an address that is free; the path of a socket may have no more than 107 characters."""
    if kind == "tcp":
        yield "127.0.0.1:0"
        return
    with tempfile.TemporaryDirectory(prefix="slip") as folder:
        yield f"unix:{Path(folder) / 'bus'}"


def join(address: str, rank: int, *, identity: Identity = IDENTITY, limits: BusLimits | None = None) -> StepEndpoint:
    return connect_rank(address, identity, rank=rank, timeout_s=PATIENCE_S, clock=monotonic_clock, limits=limits)


def gather(
    listener: StepListener,
    ranks: int,
    *,
    timeout_s: float = PATIENCE_S,
    limits: BusLimits | None = None,
    clock: Clock = monotonic_clock,
) -> StepHub:
    return listener.gather(IDENTITY, ranks=range(1, ranks + 1), timeout_s=timeout_s, clock=clock, limits=limits)


@dataclass
class Bus:
    """A hub and the other ends, rank 1 first."""

    hub: StepHub
    endpoints: list[StepEndpoint]

    @property
    def only(self) -> StepEndpoint:
        (endpoint,) = self.endpoints
        return endpoint


@contextmanager
def bus(
    kind: str, ranks: int, *, limits: BusLimits | None = None, rank_limits: BusLimits | None = None
) -> Iterator[Bus]:
    """Yield a bus whose ranks are objects of this process."""
    with addresses(kind) as address, StepListener(address) as listener:
        with ThreadPoolExecutor(max_workers=ranks) as pool:
            joining = [
                pool.submit(join, listener.address, rank, limits=rank_limits or limits) for rank in range(1, ranks + 1)
            ]
            hub = gather(listener, ranks, limits=limits)
            endpoints = [each.result(PATIENCE_S) for each in joining]
        try:
            yield Bus(hub, endpoints)
        finally:
            for endpoint in endpoints:
                endpoint.close()
            hub.close()


def read_frame(wire: Wire) -> Frame:
    """Wait for a frame on a wire that a test holds itself."""
    poll = select.poll()
    poll.register(wire.fileno(), select.POLLIN)
    while (frame := wire.take()) is None:
        assert poll.poll(PATIENCE_S * 1e3), "no frame came"
        wire.receive()
    return frame


def rank_by_hand(address: str, rank: int, identity: Identity = IDENTITY) -> Wire:
    """Do a rank's handshake and return the wire, on which anything may then be sent."""
    wire = Wire(connect(address, timeout_s=PATIENCE_S), peer="the driver", max_payload_bytes=MAX_PAYLOAD_BYTES)
    handshake = RankHandshake(identity, rank=rank)
    wire.send(FrameKind.HELLO, 0, handshake.hello(read_frame(wire).payload))
    handshake.check(read_frame(wire).payload)
    return wire


@contextmanager
def driver_by_hand(kind: str) -> Iterator[tuple[str, Callable[[], Wire]]]:
    """Yield an address, and what lets the next rank in and returns the wire to it."""
    with addresses(kind) as address:
        listening, address = listen(address)
        listening.settimeout(PATIENCE_S)

        def let_in() -> Wire:
            sock, _ = listening.accept()
            wire = Wire(sock, peer="rank 1", max_payload_bytes=MAX_PAYLOAD_BYTES)
            handshake = DriverHandshake(IDENTITY)
            wire.send(FrameKind.CHALLENGE, 0, handshake.challenge())
            _, welcome = handshake.check(read_frame(wire).payload)
            wire.send(FrameKind.WELCOME, 0, welcome)
            return wire

        try:
            yield address, let_in
        finally:
            listening.close()
