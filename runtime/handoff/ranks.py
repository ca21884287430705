"""All ranks of a replica, as the driver's desk orders them about: one word goes to all, theirs come back one by one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ...comm.kv.layout import KvOffer
from ...comm.kv.transfer import Report, TransferId
from ...comm.kv.transport import PeerDown
from .rank_hub import KvHub
from .rank_kv import RankKv
from .rank_orders import KvOrder, RankEnd, RankMoved, RankWord

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


_REMEMBERED = 4096
"""Transfers of which is remembered what was moved."""


class Ledger:
    """What ranks have moved, from what they say of it. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all = KvMoved()
        self._by_transfer: OrderedDict[TransferId, dict[int, RankMoved]] = OrderedDict()

    def note(self, word: RankMoved) -> None:
        """Take in a rank's word."""
        with self._lock:
            total = self._all
            self._all = KvMoved(
                bytes_out=total.bytes_out + word.bytes_out,
                bytes_in=total.bytes_in + word.bytes_in,
                wire_s=total.wire_s + word.wire_s,
                hidden_s=total.hidden_s + word.hidden_s,
            )
            words = self._by_transfer.setdefault(word.transfer, {})
            if any(other.generation < word.generation for other in words.values()):
                words.clear()
            words[word.rank] = word
            while len(self._by_transfer) > _REMEMBERED:
                self._by_transfer.popitem(last=False)

    def moved(self) -> KvMoved:
        """Return all of it."""
        with self._lock:
            return self._all

    def moved_of(self, transfer: TransferId) -> KvMoved | None:
        """Return what was moved of one transfer."""
        with self._lock:
            words = list(self._by_transfer.get(transfer, {}).values())
        if not words:
            return None
        # Ranks send side by side: what counts is the one that took longest, and the one that made others wait longest.
        wire_s = max(word.wire_s for word in words)
        return KvMoved(
            bytes_out=sum(word.bytes_out for word in words),
            bytes_in=sum(word.bytes_in for word in words),
            wire_s=wire_s,
            hidden_s=max(wire_s - max(word.wire_s - word.hidden_s for word in words), 0.0),
        )


class LocalKvRanks:
    """Ranks that are all in this process: a replica's only one, or threads."""

    def __init__(self, ranks: Sequence[RankKv]) -> None:
        """Take the ranks in their order, and close them in the end."""
        self._ranks = tuple(ranks)
        self._ledger = Ledger()
        self.offer = ranks[0].offer
        self.ends = tuple(rank.ends for rank in ranks)

    def listen(self, on_report: RankListener) -> None:
        """Tell somebody what ranks report."""
        for rank in self._ranks:
            rank.listen(words_to(self._ledger, rank.rank, on_report))

    def give(self, order: KvOrder) -> None:
        """Have all ranks carry out an order."""
        for rank in self._ranks:
            rank.order(order)

    def moved(self) -> KvMoved:
        """Return what has been moved since the start."""
        return self._ledger.moved()

    def moved_of(self, transfer: TransferId) -> KvMoved | None:
        """Return what was moved of a transfer."""
        return self._ledger.moved_of(transfer)

    def check(self) -> None:
        """Look whether all ranks are there."""
        for rank in self._ranks:
            rank.check()

    def close(self) -> None:
        """End everything."""
        for rank in self._ranks:
            rank.close()


class BusKvRanks:
    """The driver's own rank, and those of other processes."""

    def __init__(self, own: RankKv, hub: KvHub, *, timeout_s: float) -> None:
        """Wait until all ranks have come; both ends are closed in the end. Raises: EngineError naming who has not"""
        others = hub.wait_joined(timeout_s)
        self._own = own
        self._hub = hub
        self._ledger = Ledger()
        self.offer = own.offer
        self.ends = (own.ends, *(others[rank] for rank in sorted(others)))

    def listen(self, on_report: RankListener) -> None:
        """Tell somebody what ranks report."""
        self._own.listen(words_to(self._ledger, self._own.rank, on_report))
        self._hub.listen(lambda rank, word: words_to(self._ledger, rank, on_report)(word))

    def give(self, order: KvOrder) -> None:
        """Have all ranks carry out an order."""
        self._hub.give(order)
        self._own.order(order)

    def moved(self) -> KvMoved:
        """Return what has been moved since the start."""
        return self._ledger.moved()

    def moved_of(self, transfer: TransferId) -> KvMoved | None:
        """Return what was moved of a transfer."""
        return self._ledger.moved_of(transfer)

    def check(self) -> None:
        """Look whether all ranks are there."""
        self._own.check()
        self._hub.check()

    def close(self) -> None:
        """End everything."""
        self._own.close()
        self._hub.close()


def words_to(ledger: Ledger, rank: int, on_report: RankListener) -> Callable[[RankWord], None]:
    """Return who hears a rank's words: the ledger what was moved, somebody all else."""

    def hear(word: RankWord) -> None:
        if isinstance(word, RankMoved):
            ledger.note(word)
        else:
            on_report(rank, word)

    return hear
