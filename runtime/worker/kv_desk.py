"""Puts a driver's hand-off desk together: its ranks' ends, its lines to other drivers, its engine's blocks."""

from __future__ import annotations

from dataclasses import dataclass

from ...comm.kv.transfer import Peer, TransferLimits
from ..clock import Clock
from ..engine.engine import Engine
from ..handoff.desk import HandOffDesk
from ..handoff.host_id import host_id
from ..handoff.ranks import KvRanks
from ..handoff.settings import KvSettings
from ..handoff.talk_lines import TalkLines
from ..rpc.kv_talk import KvFacts, KvTalker


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenDesk:
    """A desk, and its lines, which a server brings calls to."""

    desk: HandOffDesk
    lines: TalkLines


def open_desk(
    settings: KvSettings,
    ranks: KvRanks,
    engine: Engine,
    talker: KvTalker,
    *,
    vocab_size: int,
    clock: Clock,
    limits: TransferLimits | None = None,
) -> OpenDesk:
    """Open a desk for an engine whose scheduler sends through it from now on; it begins with the driver's loop."""
    offer = ranks.offer
    facts = KvFacts(
        replica=settings.replica,
        incarnation=settings.incarnation,
        layout=offer.layout,
        ends=tuple({end.kind: end.address for end in ends} for ends in ranks.ends),
        host_id=host_id(),
        offer=offer,
    )
    lines = TalkLines(facts, talker, kinds=settings.kinds)
    desk = HandOffDesk(
        Peer(settings.replica, settings.incarnation),
        lock=engine.lock,
        loans=engine.scheduler,
        ranks=ranks,
        lines=lines,
        vocab_size=vocab_size,
        block_size=offer.layout.block_size,
        clock=clock,
        limits=limits,
    )
    engine.scheduler.attach(desk)
    return OpenDesk(desk=desk, lines=lines)
