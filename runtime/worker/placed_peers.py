"""The other ranks of a replica as processes that somebody else starts, on this node and others; a ``Peers``.

Nothing of theirs can be seen but their connections: one that does not come is missed at the deadline, one that is lost
is lost with its socket.
"""

from __future__ import annotations

from collections.abc import Callable

from ...comm.handshake import Identity
from .bus_peers import COMM_TIMEOUT_S, START_TIMEOUT_S, BusPeers
from .rank import RankSetup
from .rank_order import RankOrder, Seat


class PlacedPeers(BusPeers):
    """Ranks 1 and up, wherever they are; otherwise as ``BusPeers``.

    ``announce`` is told the line that they have to be told, as soon as they may come.
    """

    def __init__(
        self,
        setup: RankSetup,
        *,
        identity: Identity,
        seat: Seat,
        announce: Callable[[str], None],
        start_timeout_s: float = START_TIMEOUT_S,
        comm_timeout_s: float = COMM_TIMEOUT_S,
    ) -> None:
        self._announce = announce
        super().__init__(
            setup,
            identity,
            seat,
            bus=any_port(seat.address),
            kv_bus=any_port(seat.address),
            start_timeout_s=start_timeout_s,
            comm_timeout_s=comm_timeout_s,
        )

    def _call(self, order: RankOrder) -> None:
        self._announce(order.to_json())

    def _ended(self, *, wait_s: float = 0.0) -> str | None:
        """Nobody here sees the processes."""
        return None

    def _end(self, *, at_once: bool) -> None:
        """They end with the bus, and with whoever keeps them."""


def any_port(address: str) -> str:
    """Return where to listen at an address, on any free port."""
    return f"[{address}]:0" if ":" in address else f"{address}:0"
