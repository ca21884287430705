"""A rank's way to one rank of another replica: a queue of frames, and a thread for each connection that takes from it.

When one connection breaks the whole line is down: what went over the others may be whole, but what was under way on the
broken one is not, and nobody here knows what that was. Whoever wants to go on connects again.
"""

from __future__ import annotations

import select
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ...placement.kv_routes import token_cuts
from ..errors import CommError
from .channel import ChannelOut
from .checksum import frame_checksum
from .frame import pack_header
from .memory import KvStore, Passage
from .outgoing import Post
from .transfer import PeerRank, TransferId
from .transport import Events, PeerDown, Released

_ENDED = getattr(select, "POLLRDHUP", 0)
"""That the other end will send nothing more; where a system does not tell, it tells when the connection is gone."""


class Budget:
    """Bytes that are posted and not released yet, of all lines of a transport."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._lock = threading.Lock()

    def take(self, count: int) -> bool:
        """Take bytes, or none when too many are taken; the first is always allowed."""
        with self._lock:
            if self._used_bytes and self._used_bytes + count > self._limit_bytes:
                return False
            self._used_bytes += count
            return True

    def give(self, count: int) -> None:
        """Give bytes back."""
        with self._lock:
            self._used_bytes -= count


@dataclass(slots=True)
class _Flight:
    """A frame that was taken from the queue and is not settled."""

    post: Post
    passage: Passage | None = None

    def end(self) -> None:
        """Let go of what was lent for it."""
        if self.passage is not None:
            self.passage.end()


class Line:
    """The connections to one peer. It has to be closed, also after it went down."""

    def __init__(
        self,
        peer: PeerRank,
        channels: Sequence[ChannelOut],
        memory: KvStore,
        *,
        checksums: bool,
        budget: Budget,
        events: Events,
    ) -> None:
        self.peer = peer
        self._channels = channels
        self._memory = memory
        self._checksums = checksums
        self._budget = budget
        self._events = events
        self._queue: deque[Post] = deque()
        self._over = False
        self._changed = threading.Condition()
        name = f"slipstream-kv-to-{peer.peer.replica}-{peer.rank}"
        self._threads = [
            threading.Thread(target=self._run, args=(channel,), name=name, daemon=True) for channel in channels
        ]
        watch = select.poll()
        for channel in channels:
            watch.register(channel.fileno(), _ENDED)
        self._threads.append(threading.Thread(target=self._watch, args=(watch,), name=name, daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def up(self) -> bool:
        """Whether frames can be posted."""
        return not self._over

    def put(self, post: Post) -> bool:
        """Queue a frame whose bytes were taken from the budget; False when the line is down."""
        with self._changed:
            if self._over:
                return False
            self._queue.append(post)
            self._changed.notify()
            return True

    def cancel(self, transfer: TransferId) -> None:
        """Release what is queued of a transfer."""
        with self._changed:
            dropped = [post for post in self._queue if post.frame.transfer == transfer]
            if dropped:
                self._queue = deque(post for post in self._queue if post.frame.transfer != transfer)
        self._release(dropped)

    def take_down(self, why: str) -> None:
        """End all connections; ``why`` empty: because it was wanted here."""
        with self._changed:
            if self._over:
                return
            self._over = True
            dropped = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        for channel in self._channels:
            channel.end()
        self._release(dropped)
        if why:
            self._events.add(PeerDown(self.peer, why))

    def close(self) -> None:
        """End all connections and wait for what is going out; bounded, because every channel's wait is."""
        self.take_down("")
        for thread in self._threads:
            thread.join()
        for channel in self._channels:
            channel.close()

    def _watch(self, watch: select.poll) -> None:
        """See a connection end although nothing is sent; ours end in ``take_down`` at the latest."""
        watch.poll()
        self.take_down(f"rank {self.peer.rank} of {self.peer.peer.replica!r} is gone: its connection ended")

    def _run(self, channel: ChannelOut) -> None:
        flights: deque[_Flight] = deque()
        why = "this end failed"
        try:
            while self._turn(channel, flights):
                continue
            why = ""
        except CommError as error:
            why = str(error)
        finally:
            if why:
                self.take_down(why)
            # Nobody may read on when the memory is given back.
            channel.end()
            for flight in flights:
                flight.end()
            self._release([flight.post for flight in flights])

    def _turn(self, channel: ChannelOut, flights: deque[_Flight]) -> bool:
        """Send a frame if there is one and room for it, or wait for one that is on its way; False when it is over."""
        with self._changed:
            if not flights:
                self._changed.wait_for(lambda: self._queue or self._over)
            if self._over:
                return False
            post = self._queue.popleft() if self._queue and len(flights) < channel.ahead else None
            if post is not None:
                flights.append(_Flight(post))
        if post is not None:
            self._send(channel, flights[-1])
        for _ in range(channel.settle(wait=post is None)):
            flight = flights.popleft()
            flight.end()
            self._release([flight.post], sent=True)
        return True

    def _send(self, channel: ChannelOut, flight: _Flight) -> None:
        frame, post = flight.post.frame, flight.post
        cuts = token_cuts(frame.tokens, post.block_sizes)
        flight.passage = self._memory.outward(frame.layer, frame.heads, cuts, post.blocks)
        runs = flight.passage.runs
        # Here and not when it was posted: the thread that posts has a model to run.
        checksum = frame_checksum(frame, runs) if self._checksums else 0
        channel.send(pack_header(frame, frame.payload_bytes(self._memory.shape.entry_bytes), checksum), runs)

    def _release(self, posts: Sequence[Post], *, sent: bool = False) -> None:
        entry_bytes = self._memory.shape.entry_bytes
        for post in posts:
            self._budget.give(post.frame.payload_bytes(entry_bytes))
        self._events.add(*(Released(post.frame, sent) for post in posts))
