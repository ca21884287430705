"""One rank's end of all KV that leaves its replica or comes to it: its transports, and the thread that serves them.

Carries out the driver's orders, hears from the step thread what is computed, and says what became of it. One thread
does all of that and sleeps until there is something to do. Neither an order nor a step ever waits for it, and it waits
for no peer. What may be written into which block is decided by the gate, on the threads of those who write.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...comm.errors import CommMisuse
from ...comm.kv.incoming import Incoming, Outcome, Write
from ...comm.kv.layout import KvOffer
from ...comm.kv.tensor_memory import store_of
from ...comm.kv.transfer import Drained, Ending, OpenReceiving, Peer, PeerRank, RankBroken, RankDone, TransferId
from ...comm.kv.transport import Event, Events, LockedGate, PeerDown, Released, Written
from ...placement.kv_routes import KvLayout
from ...sdk.errors import EngineError
from ..clock import Clock
from .meetings import Meetings
from .own_folder import OwnFolder
from .rank_orders import CloseTransfer, ForgetTransfer, KvOrder, OpenReceive, OpenSend, RankEnd, RankMoved, RankWord
from .rank_sending import RankSending
from .settings import KvSeat, KvShare
from .step_notes import StepNotes
from .transports import open_transports

logger = logging.getLogger(__name__)

WordListener = Callable[[RankWord], None]

_WIRE_DTYPES = {"auto": None, "fp8": torch.float8_e4m3fn}

_IDLE_S = 3600.0
"""How long one wait for something to do lasts; whoever has something wakes the thread."""


class RankKv:
    """A rank's end; a ``StepKv`` for its executor. It has to be closed.

    Raises: CommMisuse when nobody can listen at the address, or the cache is not what the layout says
    """

    def __init__(
        self, share: KvShare, seat: KvSeat, *, rank: int, layout: KvLayout, cache: Sequence[Tensor], clock: Clock
    ) -> None:
        """Listen, and let other replicas in.

        Shapes: cache [parts, num_blocks, heads, block_size, head_dim] a layer of this rank
        """
        self.rank = rank
        self._me = Peer(share.replica, share.incarnation)
        wire = _WIRE_DTYPES[share.wire_dtype] or cache[0].dtype
        memory = self._memory = store_of(
            cache, first_layer=layout.layers_of(rank).start, heads=layout.heads_of(rank), wire=wire
        )
        self.offer = KvOffer(
            replica=share.replica,
            incarnation=share.incarnation,
            rank=rank,
            layout=layout,
            model=share.model,
            dtype=str(wire).removeprefix("torch."),
            head_dim=cache[0].shape[-1],
            parts=cache[0].shape[0],
            checksum="xxh3" if share.limits.checksums else "none",
        )
        shape = memory.shape
        self._gate = _CountingGate(self.offer, num_blocks=shape.num_blocks, entry_bytes=shape.entry_bytes)
        self._events = Events()
        wake = self._events.wake
        limits = share.limits
        self._notes = StepNotes(serial_below_tokens=limits.serial_below_tokens, clock=clock, wake=wake)
        # Bounded by the driver's machines: a few for each transfer, of which there are only so many.
        self._orders: deque[KvOrder] = deque()
        self._listener: WordListener = _nobody
        self._on_failed: Callable[[], None] = lambda: None
        self._words: list[RankWord] = []
        self._failure: BaseException | None = None
        self._over = self._closed = False
        self._closing = threading.Lock()
        self._folder = OwnFolder()
        try:
            folder = self._folder.path
            self._transports = open_transports(
                share, seat, self.offer, self._gate, memory, folder=folder, events=self._events, clock=clock
            )
        except BaseException:
            self._folder.close()
            raise
        self._meetings = Meetings(
            self._transports, timeout_s=limits.connect_timeout_s, most=limits.max_connecting, clock=clock, wake=wake
        )
        self._sending = RankSending(
            PeerRank(self._me, rank),
            layout,
            entry_bytes=shape.entry_bytes,
            max_frame_bytes=limits.max_frame_bytes,
            transports=self._transports,
            meetings=self._meetings,
            clock=clock,
        )
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
            self._closed = self._over = True
            self._events.wake()
            self._thread.join()
            for transport in self._transports.values():
                transport.close()
            self._meetings.close()
            self._folder.close()

    # -------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            while not self._over:
                self._turn(self._events.take(_IDLE_S))
        except BaseException as error:
            # Whatever it was: blocks may be read or written that nobody will say anything of any more, so that the
            # replica has to end. Its driver sees that by ``check``, another rank's by the end of its connection.
            logger.exception("the KV of rank %d can move no more", self.rank)
            self._failure = error
            self._on_failed()

    def _turn(self, events: list[Event]) -> None:
        """Take in all that there is, then post, then say what came of it."""
        while self._orders:
            self._carry_out(self._orders.popleft())
        for number, progress in self._notes.take().items():
            self._sending.advance(number, progress)
        for met in self._meetings.take():
            self._sending.met(met)
        for event in events:
            self._take_event(event)
        self._sending.post()
        words, self._words = self._words, []
        for word in (*words, *self._sending.take_words(), *self._gate.take_words()):
            self._listener(word)

    def _carry_out(self, order: KvOrder) -> None:
        match order:
            case OpenSend():
                self._sending.open(order)
            case OpenReceive(grant=grant, source=source):
                self._open_receiving(grant, source)
            case CloseTransfer(transfer=transfer, generation=generation):
                if transfer.source == self._me:
                    self._sending.close(transfer, generation)
                else:
                    with self._gate.lock:
                        self._gate.incoming.close(transfer, generation)
            case ForgetTransfer(transfer=transfer):
                self._sending.forget(transfer)

    def _open_receiving(self, grant: OpenReceiving, source: KvLayout) -> None:
        try:
            with self._gate.lock:
                self._gate.incoming.open(grant, source)
        except (CommMisuse, ValueError) as error:
            logger.error("%s cannot be received: %s", grant.transfer, error)
            self._words.append(
                RankBroken(
                    transfer=grant.transfer,
                    generation=grant.generation,
                    rank=self.rank,
                    ending=Ending.BAD_REFERENCE,
                )
            )

    def _take_event(self, event: Event) -> None:
        match event:
            case Released(frame=frame, sent=sent):
                self._sending.released(frame, sent=sent)
            case PeerDown(peer=peer):
                self._sending.down(peer)
                self._words.append(event)
            case Written():
                # The gate knows.
                pass


class _CountingGate(LockedGate):
    """The rank's gate; counts what is written through it, by transfer."""

    def __init__(self, offer: KvOffer, *, num_blocks: int, entry_bytes: int) -> None:
        super().__init__(
            Incoming(
                rank=offer.rank,
                incarnation=offer.incarnation,
                layout=offer.layout,
                num_blocks=num_blocks,
                entry_bytes=entry_bytes,
            )
        )
        self._rank = offer.rank
        self._entry_bytes = entry_bytes
        self._counted: Counter[TransferId] = Counter()

    def finish(self, write: Write, outcome: Outcome) -> None:
        """Take note of how a write ended."""
        with self.lock:
            self.incoming.finish(write, outcome)
            if outcome is Outcome.APPLIED:
                self._counted[write.frame.transfer] += write.frame.payload_bytes(self._entry_bytes)

    def take_words(self) -> list[RankWord]:
        """Return what the driver has to know, and before each end of a transfer what was written of it."""
        words: list[RankWord] = []
        with self.lock:
            for report in self.incoming.take_reports():
                count = self._counted.pop(report.transfer, 0) if isinstance(report, RankDone | Drained) else 0
                if count:
                    words.append(
                        RankMoved(
                            transfer=report.transfer,
                            generation=report.generation,
                            rank=self._rank,
                            bytes_in=count,
                        )
                    )
                words.append(report)
        return words


def _nobody(word: RankWord) -> None:
    """Hear a word before there is anybody to tell."""
