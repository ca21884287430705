"""Every transport keeps the contract: over TCP, over shared memory, and the one of tests."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from contextlib import ExitStack

from slipstream.comm.kv.channel import StreamLimits
from slipstream.comm.kv.transfer import PeerRank
from slipstream.comm.kv.transport import Event
from slipstream.tests.comm.kv.kv_ends import join, join_staged
from slipstream.tests.contracts.kv_transport import End, KvTransportContract
from slipstream.tests.fakes.memory_kv import MemoryNetwork, MemoryTransport


class TestTcp(KvTransportContract):
    def join(self, stack: ExitStack, source: End, target: End, *, max_queued_bytes: int) -> PeerRank:
        return join(stack, "tcp", source, target, limits=StreamLimits(max_queued_bytes=max_queued_bytes))


class TestTcpOneStream(KvTransportContract):
    def join(self, stack: ExitStack, source: End, target: End, *, max_queued_bytes: int) -> PeerRank:
        return join(stack, "tcp", source, target, limits=StreamLimits(max_queued_bytes=max_queued_bytes, streams=1))


class TestShm(KvTransportContract):
    def join(self, stack: ExitStack, source: End, target: End, *, max_queued_bytes: int) -> PeerRank:
        return join(stack, "shm", source, target, limits=StreamLimits(max_queued_bytes=max_queued_bytes))


class TestShmRing(KvTransportContract):
    def join(self, stack: ExitStack, source: End, target: End, *, max_queued_bytes: int) -> PeerRank:
        limits = StreamLimits(max_queued_bytes=max_queued_bytes, ring_bytes=1 << 16)
        return join(stack, "ring", source, target, limits=limits)


class TestTcpStaged(KvTransportContract):
    def join(self, stack: ExitStack, source: End, target: End, *, max_queued_bytes: int) -> PeerRank:
        return join_staged(stack, "tcp", source, target, limits=StreamLimits(max_queued_bytes=max_queued_bytes))


class TestShmStaged(KvTransportContract):
    def join(self, stack: ExitStack, source: End, target: End, *, max_queued_bytes: int) -> PeerRank:
        return join_staged(stack, "shm", source, target, limits=StreamLimits(max_queued_bytes=max_queued_bytes))


class _Steps:
    """What is to happen, in the order of time; it happens when somebody looks."""

    def __init__(self) -> None:
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._now_s = 0.0

    def later(self, rank: PeerRank, after_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self._now_s + after_s, next(self._count), act))

    def run(self) -> None:
        while self._queue:
            self._now_s, _, act = heapq.heappop(self._queue)
            act()


class _PolledMemory(MemoryTransport):
    """Lets happen what is to happen when it is polled."""

    steps: _Steps

    def poll(self, timeout_s: float) -> list[Event]:
        self.steps.run()
        return super().poll(timeout_s)


class TestMemory(KvTransportContract):
    def join(self, stack: ExitStack, source: End, target: End, *, max_queued_bytes: int) -> PeerRank:
        steps = _Steps()
        network = MemoryNetwork(steps.later)
        for end in (source, target):
            transport = _PolledMemory(network, end.me, end.gate, max_queued_bytes=max_queued_bytes)
            transport.steps = steps
            transport.register(end.kv.memory)
            stack.callback(transport.close)
            end.transport = transport
        assert isinstance(source.transport, MemoryTransport)
        return source.transport.connect(target.me)
