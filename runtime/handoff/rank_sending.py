"""What one rank sends: from the driver's word and the steps' progress to frames that transports have taken.

For one thread, the rank's own. Owns what is pure (``outgoing``), who of other replicas was met, and what is waited for
before a transfer may begin. It waits for nobody: meetings have threads of their own, and so have transports.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from ...comm.kv.frame import KvFrame
from ...comm.kv.outgoing import Outgoing
from ...comm.kv.streams import StreamTransport
from ...comm.kv.transfer import Drained, Ending, OpenSending, Peer, PeerRank, RankBroken, RankDone, TransferId
from ...placement.kv_routes import KvLayout, kv_routes
from ..clock import Clock
from .meetings import Meetings, Met
from .rank_orders import OpenSend, RankMoved, RankWord
from .step_notes import Progress
from .wire_times import WireTimes

logger = logging.getLogger(__name__)

_REMEMBERED = 4096
"""Forgotten transfers that a step on its way may still name."""


@dataclass(slots=True)
class _Opening:
    """A transfer that may be sent once its target's ranks were met."""

    order: OpenSend
    missing: set[PeerRank]


class RankSending:
    """All transfers from one rank.

    Units: entry_bytes, of one head of one token, all parts
    """

    def __init__(
        self,
        me: PeerRank,
        layout: KvLayout,
        *,
        entry_bytes: int,
        max_frame_bytes: int,
        transports: Mapping[str, StreamTransport],
        meetings: Meetings,
        clock: Clock,
    ) -> None:
        self._me = me
        self._layout = layout
        self._entry_bytes = entry_bytes
        self._transports = transports
        self._meetings = meetings
        self._clock = clock
        self._outgoing = Outgoing(rank=me.rank, layout=layout, entry_bytes=entry_bytes, max_frame_bytes=max_frame_bytes)
        self._opening: dict[TransferId, _Opening] = {}
        self._lines: dict[PeerRank, StreamTransport] = {}
        self._blocks_known: dict[TransferId, int] = {}
        self._targets: dict[TransferId, Peer] = {}
        self._forgotten: OrderedDict[TransferId, None] = OrderedDict()
        self._times = WireTimes()
        self._words: list[RankWord] = []

    def take_words(self) -> list[RankWord]:
        """Return what the driver has to know, each once."""
        words, self._words = self._words, []
        for report in self._outgoing.take_reports():
            if isinstance(report, RankDone | Drained):
                words += self._moved(report)
            words.append(report)
        return words

    # -------------------------------------------------------------- what the driver says

    def open(self, order: OpenSend) -> None:
        """Meet the ranks that this one sends to, and begin when all were."""
        grant, target = order.grant, order.target
        try:
            if len(target.ends) != target.layout.ranks:
                raise ValueError(f"{len(target.ends)} ends were given for {target.layout.ranks} ranks")
            routes = kv_routes(self._layout, target.layout)
        except ValueError as error:
            logger.error("%s cannot be sent: %s", grant.transfer, error)
            self._broken(grant, Ending.BAD_REFERENCE)
            return
        to = {PeerRank(grant.to, route.target) for route in routes if route.source == self._me.rank and grant.tokens}
        missing = to - self._lines.keys()
        self._opening[grant.transfer] = _Opening(order, missing)
        for peer in sorted(missing):
            if not self._meetings.begin(peer, target.ends[peer.rank]):
                del self._opening[grant.transfer]
                self._broken(grant, Ending.TOO_MANY)
                return
        self._maybe_open(grant.transfer)

    def close(self, transfer: TransferId, generation: int) -> None:
        """Post no more of a generation, also of one that has not begun."""
        opening = self._opening.get(transfer)
        if opening is not None and opening.order.grant.generation == generation:
            del self._opening[transfer]
        self._outgoing.close(transfer, generation)
        for transport in self._transports.values():
            transport.cancel(transfer)

    def forget(self, transfer: TransferId) -> None:
        """Note that a transfer is over for good."""
        self._outgoing.forget(transfer)
        self._blocks_known.pop(transfer, None)
        self._targets.pop(transfer, None)
        self._forgotten[transfer] = None
        while len(self._forgotten) > _REMEMBERED:
            self._forgotten.popitem(last=False)

    # -------------------------------------------------------------- what steps say

    def advance(self, number: int, progress: Progress) -> None:
        """Take in how far a prompt is computed."""
        transfer = TransferId(self._me.peer.replica, self._me.peer.incarnation, number)
        if transfer in self._forgotten:
            return
        self._outgoing.track(transfer)
        known = self._blocks_known.get(transfer, 0)
        if len(progress.blocks) > known:
            self._outgoing.add_blocks(transfer, progress.blocks[known:])
            self._blocks_known[transfer] = len(progress.blocks)
        own = self._layout.layers_of(self._me.rank)
        if progress.stop:
            for layer in own:
                self._outgoing.computed(transfer, layer, progress.stop)
            self._times.computed(progress.at_s, transfer, progress.stop)
        for layer, stop in progress.layers.items():
            self._outgoing.computed(transfer, own.start + layer, stop)

    # -------------------------------------------------------------- what others say

    def met(self, met: Met) -> None:
        """Take in how a meeting ended."""
        if met.met is not None and met.transport is not None:
            self._lines[met.met] = met.transport
        for transfer, opening in list(self._opening.items()):
            if met.wanted not in opening.missing:
                continue
            if met.ending is not None:
                del self._opening[transfer]
                self._broken(opening.order.grant, met.ending)
            else:
                opening.missing.discard(met.wanted)
                self._maybe_open(transfer)

    def down(self, peer: PeerRank) -> None:
        """Note that no connection is left to a rank."""
        self._lines.pop(peer, None)

    def released(self, frame: KvFrame, *, sent: bool) -> None:
        """Note that a frame is no longer read."""
        count = frame.payload_bytes(self._entry_bytes)
        self._times.released(self._clock(), frame.transfer, count if sent else 0)
        self._outgoing.released(frame, sent=sent)
        if not sent and (to := self._targets.get(frame.transfer)) is not None:
            # Nobody was there: whoever sends next meets them again.
            for peer in [each for each in self._lines if each.peer == to]:
                del self._lines[peer]

    def post(self) -> None:
        """Bring what is ready to the transports, as much as they take."""
        anyone = next(iter(self._transports.values()))
        while (post := self._outgoing.next_post()) is not None:
            # Without a way there the frame comes back unsent, as it would from one that has just broken.
            if not self._lines.get(post.to, anyone).post(post):
                return
            self._times.posted(self._clock(), post.frame.transfer)
            self._outgoing.posted()

    # -------------------------------------------------------------- inside

    def _maybe_open(self, transfer: TransferId) -> None:
        opening = self._opening[transfer]
        if opening.missing:
            return
        del self._opening[transfer]
        grant = opening.order.grant
        self._targets[transfer] = grant.to
        self._times.open(transfer, grant.generation, tokens=grant.tokens.stop)
        self._outgoing.open(grant, opening.order.target.layout)

    def _broken(self, grant: OpenSending, ending: Ending) -> None:
        self._words.append(
            RankBroken(transfer=grant.transfer, generation=grant.generation, rank=self._me.rank, ending=ending)
        )

    def _moved(self, report: RankDone | Drained) -> list[RankWord]:
        """Return what was moved of a transfer up to a report of its end, unless that was said."""
        time = self._times.take(report.transfer, report.generation)
        if time is None:
            return []
        return [
            RankMoved(
                transfer=report.transfer,
                generation=report.generation,
                rank=self._me.rank,
                bytes_out=time.sent_bytes,
                wire_s=time.wire_s,
                hidden_s=time.hidden_s,
            )
        ]
