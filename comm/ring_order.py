"""Who sends what to whom, and when, where ranks in a ring show one another what each of them has. Pure.

A row of tokens is cut into 2n pieces for n ranks; rank r has piece r and piece 2n - 1 - r, an early and a late one, so
that with causal attention every rank has as much to attend to. What a rank has goes round both ways at once: after hop
h a rank has that of the ranks h away from it, on either side, so n // 2 hops are enough. Where the two ways meet, at
the rank opposite, one brings its early piece and the other its late one. A rank sends what n - 1 ranks have, as in a
ring that goes one way, in half the hops and over both directions of its links.

Source: Ring Attention (arXiv 2310.01889), section 3; TokenRing (arXiv 2412.20501), which uses both directions for
queries and results. Here every rank needs all keys and values anyway, to decode with, so these travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Half(Enum):
    """Which of a rank's two pieces."""

    BOTH = "both"
    EARLY = "early"
    LATE = "late"


@dataclass(frozen=True, slots=True)
class Parcel:
    """What rank ``origin`` has, or one half of it, on its way from or to ``peer``."""

    peer: int
    origin: int
    half: Half

    def pieces(self, size: int) -> tuple[int, ...]:
        """Return the pieces in it, in order."""
        early, late = pieces_of(self.origin, size)
        match self.half:
            case Half.BOTH:
                return early, late
            case Half.EARLY:
                return (early,)
            case Half.LATE:
                return (late,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """What one rank sends and receives at a time, each in the order of peers, with one parcel for a peer at most."""

    sends: tuple[Parcel, ...]
    receives: tuple[Parcel, ...]


def pieces_of(rank: int, size: int) -> tuple[int, int]:
    """Return a rank's early and its late piece."""
    return rank, 2 * size - 1 - rank


def ring_hops(rank: int, size: int) -> tuple[Hop, ...]:
    """Return the hops of a rank among ``size``, at least 2."""
    after, before = (rank + 1) % size, (rank - 1) % size
    hops = []
    for distance in range(1, size // 2 + 1):
        # What is sent arrived with the hop before; at first it is the rank's own.
        if size == 2:
            sends = [Parcel(after, rank, Half.BOTH)]
            receives = [Parcel(after, after, Half.BOTH)]
        else:
            meet = 2 * distance == size
            forward, backward = (Half.EARLY, Half.LATE) if meet else (Half.BOTH, Half.BOTH)
            sends = [
                Parcel(after, (rank - distance + 1) % size, forward),
                Parcel(before, (rank + distance - 1) % size, backward),
            ]
            receives = [
                Parcel(before, (rank - distance) % size, forward),
                Parcel(after, (rank + distance) % size, backward),
            ]
        hops.append(Hop(sends=_by_peer(sends), receives=_by_peer(receives)))
    return tuple(hops)


def _by_peer(parcels: list[Parcel]) -> tuple[Parcel, ...]:
    return tuple(sorted(parcels, key=lambda parcel: parcel.peer))
