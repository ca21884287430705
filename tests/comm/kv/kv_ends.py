"""Ends of KV transports over sockets, for tests: joined, or spoken to by hand."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from slipstream.comm.kv.channel import Carrier, StreamLimits
from slipstream.comm.kv.memory import KvStore
from slipstream.comm.kv.shm import Shm
from slipstream.comm.kv.staging import HostCopier, StagedStore, StagingLimits
from slipstream.comm.kv.streams import StreamTransport
from slipstream.comm.kv.tcp import Tcp
from slipstream.comm.kv.transfer import PeerRank
from slipstream.runtime.clock import monotonic_clock
from slipstream.tests.contracts.kv_transport import PATIENCE_S, End

SECRET = b"a secret of the cluster"


@contextmanager
def address_for(kind: str) -> Iterator[str]:
    """Yield an address that is free."""
    if kind == "tcp":
        yield "127.0.0.1:0"
        return
    with tempfile.TemporaryDirectory(prefix="slip") as folder:
        yield f"unix:{Path(folder) / 'kv'}"


def carrier(kind: str) -> Carrier:
    """Return how bytes cross."""
    return Tcp() if kind == "tcp" else Shm(direct=kind != "ring")


def give_transport(
    stack: ExitStack,
    kind: str,
    end: End,
    *,
    limits: StreamLimits | None = None,
    secret: bytes = SECRET,
    address: str = "",
    store: KvStore | None = None,
) -> StreamTransport:
    """Give a rank its transport, with its memory, or another way to it."""
    transport = StreamTransport(
        carrier(kind),
        end.offer,
        end.gate,
        address=address or stack.enter_context(address_for(kind)),
        secret=secret,
        clock=monotonic_clock,
        limits=limits,
    )
    end.transport = transport
    stack.callback(transport.close)
    transport.register(store or end.kv.memory)
    return transport


def join(stack: ExitStack, kind: str, source: End, target: End, *, limits: StreamLimits | None = None) -> PeerRank:
    """Give both transports and connect them."""
    listening = give_transport(stack, kind, target, limits=limits)
    sending = give_transport(stack, kind, source, limits=limits)
    return sending.connect(listening.address, target.me.peer.replica, timeout_s=PATIENCE_S)


def join_staged(stack: ExitStack, kind: str, source: End, target: End, *, limits: StreamLimits) -> PeerRank:
    """Give both transports whose bytes pass through few buffers, and connect them."""
    listening, sending = (
        give_transport(stack, kind, end, limits=limits, store=staged(end)) for end in (target, source)
    )
    return sending.connect(listening.address, target.me.peer.replica, timeout_s=PATIENCE_S)


def staged(end: End, *, buffers: int = 4, timeout_s: float = PATIENCE_S) -> StagedStore:
    """Return a rank's memory as if it were a device's."""
    layers = [torch.from_numpy(layer) for layer in end.kv.array]
    return StagedStore(end.kv.memory.shape, layers, HostCopier(), StagingLimits(buffers=buffers, timeout_s=timeout_s))
