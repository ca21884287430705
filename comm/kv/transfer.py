"""The words in which the two ends of a transfer talk: ids, messages, endings, limits. Pure values.

    sender                                   receiver
      Reserve  ─────────────────────────────▶  takes blocks, or lets it wait, or refuses
      ◀──────────────────  Granted | Deferred | End
      frames, layer by layer, rank to rank ──▶  written through the grant, and checked
      Finish   ─────────────────────────────▶  once every byte is there and checked: commits
      ◀─────────────────────────  Acknowledged
      Heartbeat ◀───────────────────────────▶  each renews the other's lease
      End      ◀───────────────────────────▶  either side, at any time, with why

Messages may be lost, repeated, late or out of order. The receiver commits, and its word counts: a sender that heard
nothing after ``Finish`` says ``UNACKNOWLEDGED``, never that the KV did not arrive. A transfer may be tried again with
the next generation while its KV is still there; what belongs to an older one is stale.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True, order=True)
class Peer:
    """One life of a replica; a later life under the same name has a larger incarnation."""

    replica: str
    incarnation: int


@dataclass(frozen=True, slots=True, order=True)
class PeerRank:
    """One rank of one life of a replica."""

    peer: Peer
    rank: int


@dataclass(frozen=True, slots=True, order=True)
class TransferId:
    """A transfer's name in the whole cluster: the life that sends it, and a number never used twice in that life."""

    replica: str
    incarnation: int
    number: int

    @property
    def source(self) -> Peer:
        """The life that sends it."""
        return Peer(self.replica, self.incarnation)

    def __str__(self) -> str:
        return f"{self.replica}.{self.incarnation}/{self.number}"


class Ending(StrEnum):
    """Why a transfer ended."""

    COMMITTED = "committed"
    CANCELLED = "cancelled"
    NEVER_FITS = "never_fits"
    """More blocks than the receiver has, or more tokens than it takes."""
    NO_ROOM = "no_room"
    """No blocks within the time that it may wait for them, or too many wait already."""
    PARKED_FULL = "parked_full"
    """It would have to wait, and the sender may keep no more."""
    NO_ANSWER = "no_answer"
    LEASE_EXPIRED = "lease_expired"
    """Nothing was heard from the other side for too long."""
    UNACKNOWLEDGED = "unacknowledged"
    """Everything was sent, and nothing heard of it: the receiver may have committed."""
    DEADLINE = "deadline"
    PEER_LOST = "peer_lost"
    PEER_RESTARTED = "peer_restarted"
    STALE = "stale"
    """Of an earlier life, or an earlier generation."""
    UNKNOWN = "unknown"
    """The other side knows nothing of it."""
    CONSUMED = "consumed"
    """The reference was used before."""
    BAD_REFERENCE = "bad_reference"
    """It names what is not the sender's, or cannot be."""
    BAD_CHECKSUM = "bad_checksum"
    BAD_FRAME = "bad_frame"
    """A frame outside what was granted, or of the wrong size."""
    TOO_MANY = "too_many"
    """More transfers or peers than a side keeps."""


WORTH_ANOTHER_TRY = frozenset(
    {
        Ending.LEASE_EXPIRED,
        Ending.UNACKNOWLEDGED,
        Ending.PEER_LOST,
        Ending.PEER_RESTARTED,
        Ending.STALE,
        Ending.UNKNOWN,
        Ending.BAD_CHECKSUM,
    }
)
"""Endings after which the sender may try again with what it still has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferLimits:
    """Bounds of one end.

    Units: lease_s, how long a side keeps a transfer without hearing from the other; heartbeat_s and resend_s, between
    messages of a kind; answer_timeout_s, for a reservation's first answer; max_wait_s, for blocks; max_tries, of one
    transfer; max_parked_blocks, of the sender; max_remembered, endings that the receiver can still tell
    """

    lease_s: float = 10.0
    heartbeat_s: float = 2.0
    resend_s: float = 1.0
    answer_timeout_s: float = 5.0
    max_wait_s: float = 30.0
    max_tries: int = 2
    max_transfers: int = 4096
    max_waiting: int = 256
    max_parked_blocks: int = 4096
    max_remembered: int = 16384
    max_peers: int = 1024
    max_tokens: int = 1 << 24
    max_hand_off_bytes: int = 4 << 20
    max_hint_bytes: int = 4 << 20

    def __post_init__(self) -> None:
        if not 0 < self.heartbeat_s * 2 <= self.lease_s:
            raise ValueError(f"lease_s must be at least two heartbeats of {self.heartbeat_s:g} s, got {self.lease_s:g}")


# ------------------------------------------------------------------ messages


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """Ask for blocks for ``tokens`` positions.

    ``hint``: what the receiver's engine needs to know which prompt this is, and which prefix of it is there already.
    Units: timeout_s, until the request's deadline
    """

    transfer: TransferId
    generation: int
    tokens: int
    timeout_s: float
    hint: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """These blocks are the transfer's; positions before ``first_token`` are there already and must not be sent."""

    transfer: TransferId
    generation: int
    blocks: tuple[int, ...]
    first_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Deferred:
    """No room now; the reservation waits its turn, and the sender keeps what it has."""

    transfer: TransferId
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """All was sent. ``hand_off``: what the receiver's engine goes on with."""

    transfer: TransferId
    generation: int
    hand_off: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledged:
    """All was applied and checked, and is committed."""

    transfer: TransferId
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The transfer ended, or there is none such."""

    transfer: TransferId
    generation: int
    ending: Ending


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """These transfers are alive here."""

    alive: tuple[tuple[TransferId, int], ...]


FromSender = Reserve | Finish | End | Heartbeat
FromReceiver = Granted | Deferred | Acknowledged | End | Heartbeat


# ------------------------------------------------------------------ what a machine asks of its shell


@dataclass(frozen=True, slots=True, kw_only=True)
class Tell:
    """Send a message to a replica's other machine, to its newest life."""

    replica: str
    message: FromSender | FromReceiver


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSending:
    """Let every rank post: to the life that granted, into these blocks."""

    transfer: TransferId
    generation: int
    to: Peer
    tokens: range
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenReceiving:
    """Let every rank take frames of a transfer into these blocks."""

    transfer: TransferId
    generation: int
    tokens: range
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """Let every rank stop; each reports ``Drained`` when it no longer touches the blocks."""

    transfer: TransferId
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """The KV is complete: adopt the blocks for the request, then let the transfer go (``KvReceiver.let_go``)."""

    transfer: TransferId
    blocks: tuple[int, ...]
    hand_off: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A transfer is over at this end; said exactly once. ``by_peer``: the other end said so."""

    transfer: TransferId
    generation: int
    ending: Ending
    by_peer: bool = False


# ------------------------------------------------------------------ what ranks report


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOpened:
    """A rank takes frames of a transfer from now on; before all do, the sender must not be told of the grant."""

    transfer: TransferId
    generation: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankDone:
    """A rank sent, or applied and checked, all that is its own."""

    transfer: TransferId
    generation: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBroken:
    """At a rank something happened that ends the transfer."""

    transfer: TransferId
    generation: int
    rank: int
    ending: Ending


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained:
    """A rank that was told to close touches the transfer's blocks no longer."""

    transfer: TransferId
    generation: int
    rank: int


Report = RankOpened | RankDone | RankBroken | Drained
