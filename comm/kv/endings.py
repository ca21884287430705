"""What a receiver remembers of transfers that are over, and of the lives of its peers. Pure, and bounded.

A reference that was used may never be used again, and memory is bounded: numbers of a life count up, so what is older
than all that is remembered counts as used. Who is refused for that wrongly recomputes; that is slow, not wrong.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from .transfer import Ending, Peer, TransferId


@dataclass(slots=True)
class _Life:
    incarnation: int
    forgotten: int = -1
    """The largest number whose ending is no longer remembered."""


class Endings:
    """Endings by transfer, the last ``max_remembered`` of them; at most ``max_peers`` replicas."""

    def __init__(self, *, max_remembered: int, max_peers: int) -> None:
        self._max_remembered = max_remembered
        self._max_peers = max_peers
        self._ended: OrderedDict[TransferId, tuple[int, Ending]] = OrderedDict()
        self._lives: dict[str, _Life] = {}

    def life(self, replica: str) -> int | None:
        """Return the newest incarnation of a replica that was met."""
        life = self._lives.get(replica)
        return None if life is None else life.incarnation

    def meet(self, peer: Peer) -> Ending | None:
        """Note which life of a replica speaks; return why it is not listened to, None when it is."""
        life = self._lives.get(peer.replica)
        if life is None:
            if len(self._lives) >= self._max_peers:
                return Ending.TOO_MANY
            self._lives[peer.replica] = _Life(peer.incarnation)
        elif peer.incarnation < life.incarnation:
            return Ending.STALE
        elif peer.incarnation > life.incarnation:
            self._lives[peer.replica] = _Life(peer.incarnation)
            for transfer in [each for each in self._ended if each.replica == peer.replica]:
                del self._ended[transfer]
        return None

    def forget(self, replica: str) -> None:
        """Forget a replica that is no longer in the cluster, for good."""
        self._lives.pop(replica, None)
        for transfer in [each for each in self._ended if each.replica == replica]:
            del self._ended[transfer]

    def put(self, transfer: TransferId, generation: int, ending: Ending) -> None:
        """Remember how a transfer's generation ended; a commitment is final."""
        known = self._ended.get(transfer)
        if known is not None and (known[1] is Ending.COMMITTED or known[0] > generation):
            return
        self._ended[transfer] = (generation, ending)
        self._ended.move_to_end(transfer)
        while len(self._ended) > self._max_remembered:
            oldest, _ = self._ended.popitem(last=False)
            life = self._lives.get(oldest.replica)
            if life is not None and life.incarnation == oldest.incarnation:
                life.forgotten = max(life.forgotten, oldest.number)

    def why_not(self, transfer: TransferId, generation: int) -> Ending | None:
        """Return how this generation of a transfer has ended, None when it may begin.

        A generation after one that failed may begin; none may after one that was committed.
        """
        known = self._ended.get(transfer)
        if known is not None:
            last, ending = known
            return ending if ending is Ending.COMMITTED or generation <= last else None
        life = self._lives.get(transfer.replica)
        if life is None or life.incarnation != transfer.incarnation:
            return Ending.STALE
        return Ending.CONSUMED if transfer.number <= life.forgotten else None
