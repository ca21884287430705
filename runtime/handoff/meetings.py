"""How a rank meets ranks of other replicas: each on a thread of its own, because one that hangs takes its time.

Nobody waits for a meeting but whoever wants to send there; it ends by its deadline at the latest.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...comm.errors import BadFrame, CommError, CommMisuse, KvMismatch
from ...comm.kv.streams import StreamTransport
from ...comm.kv.transfer import Ending, PeerRank
from ...comm.wire import Deadline
from ..clock import Clock
from .rank_orders import RankEnd

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Met:
    """How a meeting ended: with the transport that leads there, or with why not."""

    wanted: PeerRank
    met: PeerRank | None = None
    transport: StreamTransport | None = None
    ending: Ending | None = None


class Meetings:
    """Meetings that are under way, at most one with each rank."""

    def __init__(
        self,
        transports: Mapping[str, StreamTransport],
        *,
        timeout_s: float,
        most: int,
        clock: Clock,
        wake: Callable[[], None],
    ) -> None:
        """``wake``: called when there is something to take."""
        self._transports = transports
        self._timeout_s = timeout_s
        self._most = most
        self._clock = clock
        self._wake = wake
        self._under_way: dict[PeerRank, threading.Thread] = {}
        self._ended: deque[Met] = deque()

    def begin(self, peer: PeerRank, ends: tuple[RankEnd, ...]) -> bool:
        """Meet a rank, at the first of its ends where somebody answers; False when too many are being met."""
        if peer in self._under_way:
            return True
        if len(self._under_way) >= self._most:
            return False
        thread = threading.Thread(target=self._run, args=(peer, ends), name="slipstream-kv-meeting", daemon=True)
        self._under_way[peer] = thread
        thread.start()
        return True

    def take(self) -> list[Met]:
        """Return how meetings ended since the last time."""
        ended: list[Met] = []
        while self._ended:
            one = self._ended.popleft()
            self._under_way.pop(one.wanted).join()
            ended.append(one)
        return ended

    def close(self) -> None:
        """Wait for all meetings: none takes longer than its deadline."""
        for thread in self._under_way.values():
            thread.join()
        self._under_way.clear()

    def _run(self, peer: PeerRank, ends: tuple[RankEnd, ...]) -> None:
        ended = Met(peer, ending=Ending.PEER_LOST)
        try:
            ended = self._meet(peer, ends)
        finally:
            self._ended.append(ended)
            self._wake()

    def _meet(self, peer: PeerRank, ends: tuple[RankEnd, ...]) -> Met:
        deadline = Deadline(self._timeout_s, self._clock)
        known = [(self._transports[end.kind], end) for end in ends if end.kind in self._transports]
        error: CommError = CommMisuse(f"no transport is common with rank {peer.rank} of {peer.peer.replica!r}")
        for transport, end in known:
            try:
                met = transport.connect(end.address, peer.peer.replica, timeout_s=deadline.remaining_s)
            except CommError as failed:
                error = failed
                # Where one kind of transport does not lead there, another may; what does not fit never will.
                if isinstance(failed, KvMismatch):
                    break
                continue
            if met == peer:
                return Met(peer, met, transport)
            logger.info("another life or rank answers at %s: %s, not %s", end.address, met, peer)
            ending = Ending.PEER_RESTARTED if met.peer.incarnation > peer.peer.incarnation else Ending.PEER_LOST
            return Met(peer, met, transport, ending)
        logger.warning("KV cannot be sent: %s", error)
        # Who refuses may be another replica that has the port now: the next grant may say another.
        never = isinstance(error, KvMismatch | CommMisuse | BadFrame)
        return Met(peer, ending=Ending.BAD_REFERENCE if never else Ending.PEER_LOST)
