"""One rank's end of all KV that leaves its replica or comes to it: its transports, and the thread that serves them.

Carries out the driver's orders, hears from the step thread what is computed, and says what became of it. One thread
does all of that, with what is pure (``outgoing``, ``incoming``); it sleeps until there is something to do. Neither an
order nor a step ever waits for it, and it waits for no peer: transports have threads of their own, and so have
meetings. What may be written into which block is decided by the gate, on the threads of those who write.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...comm.errors import CommMisuse
from ...comm.kv.frame import KvFrame
from ...comm.kv.incoming import Incoming, Outcome, Write
from ...comm.kv.layout import KvOffer
from ...comm.kv.outgoing import Outgoing
from ...comm.kv.streams import StreamTransport
from ...comm.kv.tensor_memory import store_of
from ...comm.kv.transfer import (
    Drained,
    Ending,
    OpenReceiving,
    OpenSending,
    Peer,
    PeerRank,
    RankBroken,
    RankDone,
    TransferId,
)
from ...comm.kv.transport import Event, Events, LockedGate, PeerDown, Released, Written
from ...placement.kv_routes import KvLayout, kv_routes
from ...sdk.errors import EngineError
from ..clock import Clock
from .meetings import Meetings, Met
from .rank_orders import (
    CloseTransfer,
    ForgetTransfer,
    KvOrder,
    OpenReceive,
    OpenSend,
    RankEnd,
    RankMoved,
    RankWord,
)
from .settings import KvSeat, KvShare
from .step_notes import Progress, StepNotes
from .transports import open_transports
from .wire_times import WireTimes

logger = logging.getLogger(__name__)

WordListener = Callable[[RankWord], None]

_IDLE_S = 3600.0
"""How long one wait for something to do lasts; whoever has something wakes the thread."""
_REMEMBERED = 4096
"""Forgotten transfers that a step on its way may still name."""


@dataclass(slots=True)
class _Opening:
    """A transfer that may be sent once its target's ranks were met."""

    order: OpenSend
    missing: set[PeerRank]


class RankKv:
    """A rank's end; a ``StepKv`` for its executor. It has to be closed.

    Raises: CommMisuse when nobody can listen at the address, or the cache is not what the layout says
    """

    def __init__(
        self, share: KvShare, seat: KvSeat, *, rank: int, layout: KvLayout, cache: Sequence[Tensor], clock: Clock
    ) -> None:
        """Listen, and let other replicas in.

        Shapes: cache [2, num_blocks, heads, block_size, head_dim] a layer of this rank
        """
        self.rank = rank
        self._me = Peer(share.replica, share.incarnation)
        self._layout = layout
        self._limits = share.limits
        self._clock = clock
        memory = store_of(cache, first_layer=layout.layers_of(rank).start, heads=layout.heads_of(rank))
        self._memory = memory
        self._row_bytes = memory.shape.row_bytes
        self.offer = KvOffer(
            replica=share.replica,
            incarnation=share.incarnation,
            rank=rank,
            layout=layout,
            model=share.model,
            dtype=str(cache[0].dtype).removeprefix("torch."),
            head_dim=cache[0].shape[-1],
            checksum="xxh3" if share.limits.checksums else "none",
        )
        self._outgoing = Outgoing(
            rank=rank, layout=layout, row_bytes=self._row_bytes, max_frame_bytes=share.limits.max_frame_bytes
        )
        self._gate = _CountingGate(
            Incoming(
                rank=rank,
                incarnation=share.incarnation,
                layout=layout,
                num_blocks=memory.shape.num_blocks,
                row_bytes=self._row_bytes,
            ),
            row_bytes=self._row_bytes,
        )
        self._events = Events()
        self._notes = StepNotes(
            serial_below_tokens=share.limits.serial_below_tokens, clock=clock, wake=self._events.wake
        )
        self._orders: deque[KvOrder] = deque()
        self._listener: WordListener = _nobody
        self._on_failed: Callable[[], None] = lambda: None
        # The thread's own: what is open, who was met, and what was said of the prompts.
        self._opening: dict[TransferId, _Opening] = {}
        self._lines: dict[PeerRank, StreamTransport] = {}
        self._blocks_known: dict[TransferId, int] = {}
        self._targets: dict[TransferId, Peer] = {}
        self._forgotten: OrderedDict[TransferId, None] = OrderedDict()
        self._times = WireTimes()
        self._words: list[RankWord] = []
        self._failure: BaseException | None = None
        self._over = False
        self._closing = threading.Lock()
        self._closed = False
        self._folder = tempfile.TemporaryDirectory(prefix="slipstream-kv-")
        try:
            self._transports = open_transports(
                share,
                seat,
                self.offer,
                self._gate,
                folder=Path(self._folder.name),
                events=self._events,
                clock=clock,
            )
        except BaseException:
            self._folder.cleanup()
            raise
        self._meetings = Meetings(
            self._transports,
            timeout_s=share.limits.connect_timeout_s,
            most=share.limits.max_connecting,
            clock=clock,
            wake=self._events.wake,
        )
        for transport in self._transports.values():
            transport.register(memory)
        self.ends = tuple(RankEnd(kind, transport.address) for kind, transport in self._transports.items())
        """Where other replicas reach this rank, by kinds of transports, the one that is preferred first."""
        self._thread = threading.Thread(target=self._run, name=f"slipstream-kv-{rank}", daemon=True)
        self._thread.start()

    # -------------------------------------------------------------- the driver

    def listen(self, on_word: WordListener, *, on_failed: Callable[[], None] = lambda: None) -> None:
        """Tell somebody what happens here, on this rank's thread; once, before the first order.

        ``on_failed``: called when nothing more will happen, although nobody has closed it; ``check`` says why.
        """
        self._listener, self._on_failed = on_word, on_failed

    def order(self, order: KvOrder) -> None:
        """Carry out an order after those before it; never waits."""
        self._orders.append(order)
        self._events.wake()

    def check(self) -> None:
        """Raises: EngineError when this end has failed"""
        if self._failure is not None:
            raise EngineError(f"the KV of rank {self.rank} can move no more: {self._failure!r}")

    # -------------------------------------------------------------- the step thread

    def begin_step(self, numbers: list[int], blocks: list[list[int]], stops: list[int]) -> None:
        """Note which rows of the step that begins are sent; see ``StepKv``."""
        self._notes.begin_step(numbers, blocks, stops)

    def layer_done(self, layer: int) -> None:
        """Note that a layer has written its KV."""
        self._memory.mark()
        self._notes.layer_done(layer)

    def end_step(self) -> None:
        """Note that all layers have."""
        self._memory.mark()
        self._notes.end_step()

    def close(self) -> None:
        """End everything: afterwards nothing reads or writes the cache. Idempotent; waits seconds at most."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._over = True
            self._events.wake()
            self._thread.join()
            for transport in self._transports.values():
                transport.close()
            self._meetings.close()
            self._folder.cleanup()

    # -------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            while not self._over:
                events = self._events.take(_IDLE_S)
                while self._orders:
                    self._carry_out(self._orders.popleft())
                for number, progress in self._notes.take().items():
                    self._advance(number, progress)
                for met in self._meetings.take():
                    self._take_met(met)
                for event in events:
                    self._take_event(event)
                self._post()
                self._say()
        except BaseException as error:
            # Whatever it was: blocks may be read or written that nobody will say anything of any more, so that the
            # replica has to end. Its driver sees that by ``check``, another rank's by the end of its connection.
            logger.exception("the KV of rank %d can move no more", self.rank)
            self._failure = error
            self._on_failed()

    def _carry_out(self, order: KvOrder) -> None:
        match order:
            case OpenSend():
                self._begin_sending(order)
            case OpenReceive(grant=grant, source=source):
                self._begin_receiving(grant, source)
            case CloseTransfer(transfer=transfer, generation=generation):
                self._close_transfer(transfer, generation)
            case ForgetTransfer(transfer=transfer):
                self._outgoing.forget(transfer)
                self._blocks_known.pop(transfer, None)
                self._targets.pop(transfer, None)
                self._forgotten[transfer] = None
                while len(self._forgotten) > _REMEMBERED:
                    self._forgotten.popitem(last=False)

    def _begin_receiving(self, grant: OpenReceiving, source: KvLayout) -> None:
        try:
            with self._gate.lock:
                self._gate.incoming.open(grant, source)
        except (CommMisuse, ValueError) as error:
            logger.error("%s cannot be received: %s", grant.transfer, error)
            self._broken(grant, Ending.BAD_REFERENCE)

    def _begin_sending(self, order: OpenSend) -> None:
        grant, target = order.grant, order.target
        try:
            if len(target.ends) != target.layout.ranks:
                raise ValueError(f"{len(target.ends)} ends were given for {target.layout.ranks} ranks")
            routes = kv_routes(self._layout, target.layout)
        except ValueError as error:
            logger.error("%s cannot be sent: %s", grant.transfer, error)
            self._broken(grant, Ending.BAD_REFERENCE)
            return
        to = {PeerRank(grant.to, route.target) for route in routes if route.source == self.rank and grant.tokens}
        missing = to - self._lines.keys()
        self._opening[grant.transfer] = _Opening(order, missing)
        for peer in sorted(missing):
            if not self._meetings.begin(peer, target.ends[peer.rank]):
                del self._opening[grant.transfer]
                self._broken(grant, Ending.TOO_MANY)
                return
        self._maybe_open(grant.transfer)

    def _maybe_open(self, transfer: TransferId) -> None:
        opening = self._opening[transfer]
        if opening.missing:
            return
        del self._opening[transfer]
        grant = opening.order.grant
        self._targets[transfer] = grant.to
        self._times.open(transfer, grant.generation)
        self._outgoing.open(grant, opening.order.target.layout)

    def _take_met(self, met: Met) -> None:
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

    def _close_transfer(self, transfer: TransferId, generation: int) -> None:
        if transfer.source != self._me:
            with self._gate.lock:
                self._gate.incoming.close(transfer, generation)
            return
        opening = self._opening.get(transfer)
        if opening is not None and opening.order.grant.generation == generation:
            del self._opening[transfer]
        self._outgoing.close(transfer, generation)
        for transport in self._transports.values():
            transport.cancel(transfer)

    def _advance(self, number: int, progress: Progress) -> None:
        """Take in how far a prompt is computed."""
        transfer = TransferId(self._me.replica, self._me.incarnation, number)
        if transfer in self._forgotten:
            return
        self._outgoing.track(transfer)
        known = self._blocks_known.get(transfer, 0)
        if len(progress.blocks) > known:
            self._outgoing.add_blocks(transfer, progress.blocks[known:])
            self._blocks_known[transfer] = len(progress.blocks)
        own = self._layout.layers_of(self.rank)
        if progress.stop:
            for layer in own:
                self._outgoing.computed(transfer, layer, progress.stop)
            self._times.computed(progress.at_s, transfer)
        for layer, stop in progress.layers.items():
            self._outgoing.computed(transfer, own.start + layer, stop)

    def _take_event(self, event: Event) -> None:
        match event:
            case Released(frame=frame, sent=sent):
                self._released(frame, sent=sent)
            case PeerDown(peer=peer):
                self._lines.pop(peer, None)
                self._words.append(event)
            case Written():
                # The gate knows.
                pass

    def _released(self, frame: KvFrame, *, sent: bool) -> None:
        count = frame.payload_bytes(self._row_bytes)
        self._times.released(self._clock(), frame.transfer, count if sent else 0)
        self._outgoing.released(frame, sent=sent)
        if not sent and (to := self._targets.get(frame.transfer)) is not None:
            # Nobody was there: whoever sends next meets them again.
            for peer in [each for each in self._lines if each.peer == to]:
                del self._lines[peer]

    def _post(self) -> None:
        """Bring what is ready to the transports, as much as they take."""
        anyone = next(iter(self._transports.values()))
        while (post := self._outgoing.next_post()) is not None:
            # Without a way there the frame comes back unsent, as it would from one that has just broken.
            if not self._lines.get(post.to, anyone).post(post):
                return
            self._times.posted(self._clock(), post.frame.transfer)
            self._outgoing.posted()

    def _broken(self, grant: OpenSending | OpenReceiving, ending: Ending) -> None:
        self._words.append(
            RankBroken(transfer=grant.transfer, generation=grant.generation, rank=self.rank, ending=ending)
        )

    def _say(self) -> None:
        words, self._words = self._words, []
        for report in self._outgoing.take_reports():
            if isinstance(report, RankDone | Drained):
                words += self._moved_out(report)
            words.append(report)
        words += self._gate.take_words(self.rank)
        for word in words:
            self._listener(word)

    def _moved_out(self, report: RankDone | Drained) -> list[RankWord]:
        """Return what was moved of a transfer up to a report of its end, unless that was said."""
        time = self._times.take(report.transfer, report.generation)
        if time is None:
            return []
        return [
            RankMoved(
                transfer=report.transfer,
                generation=report.generation,
                rank=self.rank,
                bytes_out=time.sent_bytes,
                wire_s=time.wire_s,
                hidden_s=time.hidden_s,
            )
        ]


class _CountingGate(LockedGate):
    """The rank's gate; counts what is written through it, by transfer."""

    def __init__(self, incoming: Incoming, *, row_bytes: int) -> None:
        super().__init__(incoming)
        self._row_bytes = row_bytes
        self._counted: Counter[TransferId] = Counter()

    def finish(self, write: Write, outcome: Outcome) -> None:
        """Take note of how a write ended."""
        with self.lock:
            self.incoming.finish(write, outcome)
            if outcome is Outcome.APPLIED:
                self._counted[write.frame.transfer] += write.frame.payload_bytes(self._row_bytes)

    def take_words(self, rank: int) -> list[RankWord]:
        """Return what the driver has to know, and before each end of a transfer what was written of it."""
        words: list[RankWord] = []
        with self.lock:
            for report in self.incoming.take_reports():
                if isinstance(report, RankDone | Drained) and (count := self._counted.pop(report.transfer, 0)):
                    name = (report.transfer, report.generation)
                    words.append(RankMoved(transfer=name[0], generation=name[1], rank=rank, bytes_in=count))
                words.append(report)
        return words


def _nobody(word: RankWord) -> None:
    """Hear a word before there is anybody to tell."""
