"""Shows every rank of a ring what each of them has, hop by hop; the caller computes while a hop is on the wire.

Owns what is held and what is packed; ``ring_order`` says who sends what. A hop is one exchange with the neighbours,
because NCCL's sends and receives would wait for one another's turn. Knows tokens by number only.

Shapes: E, L tokens of a rank's early and late pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .collectives import Collectives, Work
from .ring_order import Half, Hop, Parcel, pieces_of


class RingPass:
    """One round: what the ranks have of one layer of one step.

    Shapes: own [E + L, ...], contiguous, early first; tokens_of_piece [2 * ranks], the same on all ranks
    """

    def __init__(self, group: Collectives, own: Tensor, tokens_of_piece: Sequence[int]) -> None:
        self._group = group
        self._tokens_of_piece = tokens_of_piece
        self._held: dict[int, Tensor] = {group.rank: own}

    def begin(self, hop: Hop) -> Work:
        """Start a hop; its result is for ``take``. Every rank begins its hops in order."""
        leaving = [self._half_of(parcel) for parcel in hop.sends]
        counts = self._counts
        return self._group.all_to_all(
            leaving[0] if len(leaving) == 1 else torch.cat(leaving),
            send_counts=counts(hop.sends),
            receive_counts=counts(hop.receives),
        )

    def take(self, hop: Hop, received: Tensor) -> None:
        """Hold what a hop has brought, to send it on with the next."""
        parts = received.split([self._tokens(parcel) for parcel in hop.receives])
        for parcel, part in zip(hop.receives, parts, strict=True):
            self._held[parcel.origin] = part

    def _half_of(self, parcel: Parcel) -> Tensor:
        held = self._held[parcel.origin]
        early = self._tokens_of_piece[pieces_of(parcel.origin, self._group.size)[0]]
        match parcel.half:
            case Half.BOTH:
                return held
            case Half.EARLY:
                return held[:early]
            case Half.LATE:
                return held[early:]

    def _counts(self, parcels: Sequence[Parcel]) -> list[int]:
        by_peer = [0] * self._group.size
        for parcel in parcels:
            by_peer[parcel.peer] = self._tokens(parcel)
        return by_peer

    def _tokens(self, parcel: Parcel) -> int:
        return sum(self._tokens_of_piece[piece] for piece in parcel.pieces(self._group.size))
