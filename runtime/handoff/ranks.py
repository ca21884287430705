"""All ranks of a replica, as the driver's desk orders them about: one word goes to all, theirs come back one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ...comm.kv.layout import KvOffer
from ...comm.kv.transfer import Report, TransferId
from ...comm.kv.transport import PeerDown
from .rank_orders import KvOrder, RankEnd

RankListener = Callable[[int, Report | PeerDown], None]
"""Told which rank says what; called from any thread, and must not wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvMoved:
    """What ranks have moved: all of them together, or of one transfer.

    Units: wire_s, in which some frame that goes out was on its way; hidden_s, the part of it before its prompt was
    computed
    """

    bytes_out: int = 0
    bytes_in: int = 0
    wire_s: float = 0.0
    hidden_s: float = 0.0


class KvRanks(Protocol):
    """The ranks of one replica. Has to be closed."""

    @property
    def offer(self) -> KvOffer:
        """What the first rank offers to others; those of the others differ in their rank alone."""
        ...

    @property
    def ends(self) -> tuple[tuple[RankEnd, ...], ...]:
        """Where each rank takes KV in."""
        ...

    def listen(self, on_report: RankListener) -> None:
        """Tell somebody what ranks report, from the first word on; called once, before the first order."""
        ...

    def give(self, order: KvOrder) -> None:
        """Have all ranks carry out an order, after those before; never waits, and raises nothing: see ``check``."""
        ...

    def moved(self) -> KvMoved:
        """Return what has been moved since the start, as far as transfers are done or closed."""
        ...

    def moved_of(self, transfer: TransferId) -> KvMoved | None:
        """Return what was moved of a transfer, in its newest generation; None of one that nobody remembers."""
        ...

    def check(self) -> None:
        """Look, without waiting, whether all ranks are there. Raises: EngineError naming the one that is not"""
        ...

    def close(self) -> None:
        """End everything; waits seconds at most. Idempotent."""
        ...
