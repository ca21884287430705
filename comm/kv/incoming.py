"""What may be written into one rank's blocks: the gate that every frame passes before a byte of it is stored. Pure.

A frame is written only through a live grant, once, and within what was granted. What is late, stale, repeated or not
the sender's is dropped and counted; what cannot come from a sender that works as it should ends its transfer. A write
that has begun keeps its blocks: ``Drained`` is reported when the last one is over.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass
from enum import Enum, StrEnum, auto

from ...placement.kv_routes import KvLayout, kv_routes, token_cuts
from ..errors import CommMisuse
from .coverage import Claim, Coverage, Part
from .frame import KvFrame, KvHeader
from .transfer import Drained, Ending, OpenReceiving, PeerRank, RankBroken, RankDone, RankOpened, Report, TransferId

_REMEMBERED = 1024


class Drop(StrEnum):
    """Why a frame is not written."""

    UNKNOWN = "unknown"
    LATE = "late"
    """Its transfer is over, or about to be."""
    STALE = "stale"
    """Of an earlier generation, or for an earlier life of this replica."""
    DUPLICATE = "duplicate"
    FOREIGN = "foreign"
    """Not from the life that the transfer belongs to."""
    BAD = "bad"
    """Outside the grant, or of the wrong size; the transfer ends."""


class Outcome(Enum):
    """How a write ended."""

    APPLIED = auto()
    BAD_CHECKSUM = auto()
    LOST = auto()


@dataclass(frozen=True, slots=True)
class Write:
    """Leave to write a frame: its tokens, cut at ``cuts``, into this rank's blocks of the prompt."""

    frame: KvFrame
    blocks: tuple[int, ...]
    cuts: tuple[int, ...]


@dataclass(slots=True)
class _Grant:
    grant: OpenReceiving
    coverage: Coverage
    source_block_size: int
    writing: int = 0
    closing: bool = False
    broken: bool = False


class Incoming:
    """The transfers to one rank of one life of a replica.

    Units: entry_bytes, of one head of one token, all parts
    """

    def __init__(self, *, rank: int, incarnation: int, layout: KvLayout, num_blocks: int, entry_bytes: int) -> None:
        self._rank = rank
        self._incarnation = incarnation
        self._layout = layout
        self._num_blocks = num_blocks
        self._entry_bytes = entry_bytes
        self._grants: dict[TransferId, _Grant] = {}
        self._over: OrderedDict[TransferId, int] = OrderedDict()
        self._reports: list[Report] = []
        self.dropped: Counter[Drop] = Counter()
        """Frames that were not written, by why."""

    def take_reports(self) -> list[Report]:
        """Return what the driver has to know, each once."""
        reports, self._reports = self._reports, []
        return reports

    # -------------------------------------------------------------- what the driver says

    def open(self, grant: OpenReceiving, source: KvLayout) -> None:
        """Let frames of a transfer in, from a replica of this layout.

        Raises: CommMisuse for blocks that there are not
        """
        size = self._layout.block_size
        if any(not 0 <= block < self._num_blocks for block in grant.blocks):
            raise CommMisuse(f"{grant.transfer} was granted blocks beyond the {self._num_blocks} of rank {self._rank}")
        written = grant.blocks[grant.tokens.start // size : -(-grant.tokens.stop // size)]
        if grant.tokens.stop > len(grant.blocks) * size or len(set(written)) != len(written):
            raise CommMisuse(f"{grant.transfer} was granted too few blocks, or one of them twice")
        assert grant.transfer not in self._grants, f"{grant.transfer} is open already"
        parts = [
            Part(layer, route.heads.start, len(route.heads), route.source)
            for route in kv_routes(source, self._layout)
            if route.target == self._rank
            for layer in route.layers
        ]
        one = _Grant(grant, Coverage(parts, grant.tokens), source.block_size)
        self._grants[grant.transfer] = one
        self._reports.append(RankOpened(transfer=grant.transfer, generation=grant.generation, rank=self._rank))
        self._maybe_done(one)

    def close(self, transfer: TransferId, generation: int) -> None:
        """Let no more frames of a generation in, and report when the last write is over."""
        one = self._grants.get(transfer)
        if one is None or one.grant.generation != generation:
            self._reports.append(Drained(transfer=transfer, generation=generation, rank=self._rank))
            return
        one.closing = True
        self._maybe_drained(one)

    # -------------------------------------------------------------- what the transport says

    def admit(self, header: KvHeader, peer: PeerRank) -> Write | Drop:
        """Say whether a frame from a peer may be written; the write has begun when the answer is one."""
        answer = self._judge(header, peer)
        if isinstance(answer, Drop):
            self.dropped[answer] += 1
        return answer

    def finish(self, write: Write, outcome: Outcome) -> None:
        """Note how a write ended; it touches the blocks no longer."""
        one = self._grants[write.frame.transfer]
        one.writing -= 1
        match outcome:
            case Outcome.APPLIED:
                one.coverage.applied(write.frame.num_tokens)
                self._maybe_done(one)
            case Outcome.BAD_CHECKSUM:
                self._break(one, Ending.BAD_CHECKSUM)
            case Outcome.LOST:
                self._break(one, Ending.PEER_LOST)
        if one.closing:
            self._maybe_drained(one)

    # -------------------------------------------------------------- inside

    def _judge(self, header: KvHeader, peer: PeerRank) -> Write | Drop:
        frame = header.frame
        if frame.transfer.source != peer.peer:
            return Drop.FOREIGN
        if frame.receiver != self._incarnation:
            return Drop.STALE
        one = self._grants.get(frame.transfer)
        if one is None:
            return Drop.LATE if frame.generation <= self._over.get(frame.transfer, 0) else Drop.UNKNOWN
        if frame.generation != one.grant.generation:
            return Drop.STALE if frame.generation < one.grant.generation else Drop.UNKNOWN
        if one.closing or one.broken:
            return Drop.LATE
        part = Part(frame.layer, frame.first_head, frame.num_heads, peer.rank)
        if header.payload_bytes != frame.payload_bytes(self._entry_bytes):
            self._break(one, Ending.BAD_FRAME)
            return Drop.BAD
        match one.coverage.claim(part, frame.first_token, frame.first_token + frame.num_tokens):
            case Claim.DUPLICATE:
                return Drop.DUPLICATE
            case Claim.OUTSIDE:
                self._break(one, Ending.BAD_FRAME)
                return Drop.BAD
            case Claim.NEW:
                one.writing += 1
                cuts = token_cuts(frame.tokens, (one.source_block_size, self._layout.block_size))
                return Write(frame, one.grant.blocks, tuple(cuts))

    def _break(self, one: _Grant, ending: Ending) -> None:
        if one.broken or one.closing:
            return
        one.broken = True
        grant = one.grant
        self._reports.append(
            RankBroken(transfer=grant.transfer, generation=grant.generation, rank=self._rank, ending=ending)
        )

    def _maybe_done(self, one: _Grant) -> None:
        if one.coverage.complete and not one.closing and not one.broken:
            grant = one.grant
            self._reports.append(RankDone(transfer=grant.transfer, generation=grant.generation, rank=self._rank))

    def _maybe_drained(self, one: _Grant) -> None:
        if one.writing:
            return
        grant = one.grant
        del self._grants[grant.transfer]
        self._over[grant.transfer] = grant.generation
        self._over.move_to_end(grant.transfer)
        while len(self._over) > _REMEMBERED:
            self._over.popitem(last=False)
        self._reports.append(Drained(transfer=grant.transfer, generation=grant.generation, rank=self._rank))
