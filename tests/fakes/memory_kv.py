"""A KV transport within one process, whose network does to frames what it is told: late, lost, twice, changed.

It keeps the contract of those over sockets. Nothing happens but through ``later``: whoever runs that is the world.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from slipstream.comm.errors import CommMisuse
from slipstream.comm.kv.checksum import frame_checksum
from slipstream.comm.kv.frame import KvFrame, KvHeader
from slipstream.comm.kv.incoming import Drop, Outcome, Write
from slipstream.comm.kv.memory import KvMemory, KvStore, Runs
from slipstream.comm.kv.outgoing import Post
from slipstream.comm.kv.transfer import PeerRank, TransferId
from slipstream.comm.kv.transport import Event, Gate, PeerDown, Released, Written, need
from slipstream.placement.kv_routes import token_cuts

Later = Callable[[PeerRank, float, Callable[[], None]], None]
"""Does something at a rank after some seconds."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One arrival of a frame: after how long, how long its bytes take, and whether one of them changes on the way."""

    after_s: float = 0.0
    lasts_s: float = 0.0
    changed: bool = False


Fate = Callable[[KvFrame], list[Arrival]]


def well(frame: KvFrame) -> list[Arrival]:
    """Every frame arrives once."""
    return [Arrival()]


class MemoryNetwork:
    """All transports that can reach one another."""

    def __init__(self, later: Later, *, fate: Fate = well, send_s: Callable[[], float] = lambda: 0.0) -> None:
        self.later = later
        self.fate = fate
        self.send_s = send_s
        self.ends: dict[PeerRank, MemoryTransport] = {}
        self._cuts: dict[tuple[PeerRank, PeerRank], int] = {}

    def epoch(self, source: PeerRank, target: PeerRank) -> int:
        """Return how often this way was cut."""
        return self._cuts.get((source, target), 0)

    def cut(self, source: PeerRank, target: PeerRank, why: str) -> None:
        """Break a connection: what is on its way is lost, and both ends that live see it."""
        self._cuts[source, target] = self.epoch(source, target) + 1
        if source in self.ends:
            self.ends[source].lose(target, why)
        if target in self.ends:
            self.ends[target].lose(source, why)


class MemoryTransport:
    """One rank's end."""

    def __init__(
        self,
        network: MemoryNetwork,
        me: PeerRank,
        gate: Gate,
        *,
        checksums: bool = True,
        max_queued_bytes: int = 1 << 30,
    ) -> None:
        self._network = network
        self._me = me
        self._gate = gate
        self._checksums = checksums
        self._max_queued_bytes = max_queued_bytes
        self._queued_bytes = 0
        self._queue: list[Post] = []
        self._peers: set[PeerRank] = set()
        self._senders: set[PeerRank] = set()
        self._writes: list[tuple[Write, PeerRank]] = []
        self._events: list[Event] = []
        self._memory: KvMemory | None = None
        self.closed = False
        network.ends[me] = self

    def register(self, memory: KvStore) -> None:
        assert isinstance(memory, KvMemory)
        if self._memory is not None:
            raise CommMisuse("this KV transport has its memory already")
        self._memory = memory

    def connect(self, to: PeerRank) -> PeerRank:
        need(self._memory)
        self._peers.add(to)
        self._network.ends[to]._senders.add(self._me)
        return to

    def post(self, post: Post) -> bool:
        size = post.frame.payload_bytes(need(self._memory).shape.entry_bytes)
        if self._queued_bytes and self._queued_bytes + size > self._max_queued_bytes:
            return False
        self._queued_bytes += size
        if post.to not in self._peers or self.closed:
            self._release(post, sent=False)
        else:
            self._queue.append(post)
            self._network.later(self._me, self._network.send_s(), partial(self._send, post))
        return True

    def poll(self, timeout_s: float) -> list[Event]:
        events, self._events = self._events, []
        return events

    def cancel(self, transfer: TransferId) -> None:
        self._drop(lambda post: post.frame.transfer == transfer)

    def close(self) -> None:
        self.end(seen=True)

    def end(self, *, seen: bool) -> None:
        """End everything; where it is not seen, as when a host is gone, the other ends learn nothing of it."""
        if self.closed:
            return
        self.closed = True
        self._drop(lambda post: True)
        for write, _ in self._writes:
            self._over(write, Outcome.LOST)
        self._writes.clear()
        del self._network.ends[self._me]
        for other in list(self._network.ends.values()) if seen else ():
            other.lose(self._me, "the other end was closed")

    def lose(self, peer: PeerRank, why: str) -> None:
        """See a connection end."""
        known = peer in self._peers or peer in self._senders
        self._peers.discard(peer)
        self._senders.discard(peer)
        self._drop(lambda post: post.to == peer)
        for write, source in list(self._writes):
            if source == peer:
                self._writes.remove((write, source))
                self._over(write, Outcome.LOST)
        if known:
            self._events.append(PeerDown(peer, why))

    def _send(self, post: Post) -> None:
        if post not in self._queue:
            return
        self._queue.remove(post)
        frame, memory = post.frame, need(self._memory)
        runs = memory.runs(frame.layer, frame.heads, token_cuts(frame.tokens, post.block_sizes), post.blocks)
        payload = b"".join(runs)
        header = KvHeader(
            frame=frame,
            payload_bytes=len(payload),
            checksum=frame_checksum(frame, runs) if self._checksums else 0,
        )
        epoch = self._network.epoch(self._me, post.to)
        for arrival in self._network.fate(frame):
            changed = bytes([payload[0] ^ 0x55]) + payload[1:] if arrival.changed else payload
            act = partial(self._arrive, post.to, header, changed, arrival.lasts_s, epoch)
            self._network.later(post.to, arrival.after_s, act)
        self._release(post, sent=True)

    def _arrive(self, to: PeerRank, header: KvHeader, payload: bytes, lasts_s: float, epoch: int) -> None:
        target = self._network.ends.get(to)
        if target is not None and self._network.epoch(self._me, to) == epoch:
            target._begin(header, payload, self._me, lasts_s)

    def _begin(self, header: KvHeader, payload: bytes, source: PeerRank, lasts_s: float) -> None:
        answer = self._gate.admit(header, source)
        if isinstance(answer, Drop):
            return
        self._writes.append((answer, source))
        # Not at once, as over any network: what is between the halves must not matter.
        self._store(answer, payload, half=0)
        self._network.later(self._me, lasts_s, partial(self._end, answer, header, payload))

    def _end(self, write: Write, header: KvHeader, payload: bytes) -> None:
        held = next((each for each in self._writes if each[0] is write), None)
        if held is None:
            return
        self._writes.remove(held)
        runs = self._store(write, payload, half=1)
        right = not self._checksums or frame_checksum(write.frame, runs) == header.checksum
        self._over(write, Outcome.APPLIED if right else Outcome.BAD_CHECKSUM)

    def _store(self, write: Write, payload: bytes, *, half: int) -> Runs:
        frame = write.frame
        runs = need(self._memory).runs(frame.layer, frame.heads, write.cuts, write.blocks)
        at = 0
        for index, run in enumerate(runs):
            if half or index % 2 == 0:
                run[:] = payload[at : at + len(run)]
            at += len(run)
        return runs

    def _over(self, write: Write, outcome: Outcome) -> None:
        self._gate.finish(write, outcome)
        self._events.append(Written(write.frame, outcome))

    def _drop(self, which: Callable[[Post], bool]) -> None:
        dropped = [post for post in self._queue if which(post)]
        self._queue = [post for post in self._queue if not which(post)]
        for post in dropped:
            self._release(post, sent=False)

    def _release(self, post: Post, *, sent: bool) -> None:
        self._queued_bytes -= post.frame.payload_bytes(need(self._memory).shape.entry_bytes)
        self._events.append(Released(post.frame, sent))
