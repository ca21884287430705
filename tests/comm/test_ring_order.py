"""The order of the ring, by itself: what is sent is there and is awaited, and in the end everybody has everything."""

from __future__ import annotations

from collections import Counter

import pytest

from slipstream.comm.ring_order import pieces_of, ring_hops

SIZES = range(2, 10)


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_comes_to_have_every_piece_once(size: int) -> None:
    hops = [ring_hops(rank, size) for rank in range(size)]
    assert {len(of_rank) for of_rank in hops} == {size // 2}
    held = [set(pieces_of(rank, size)) for rank in range(size)]
    for number in range(size // 2):
        brought: list[list[int]] = [[] for _ in range(size)]
        for rank in range(size):
            for parcel in hops[rank][number].sends:
                pieces = parcel.pieces(size)
                assert set(pieces) <= held[rank], "sent before it came"
                awaited = [other for other in hops[parcel.peer][number].receives if other.peer == rank]
                assert [(other.origin, other.half) for other in awaited] == [(parcel.origin, parcel.half)]
                brought[parcel.peer] += pieces
            assert len(hops[rank][number].sends) == len(hops[rank][number].receives)
        for rank, came in enumerate(brought):
            assert not held[rank] & set(came), "sent twice"
            held[rank] |= set(came)
    assert held == [set(range(2 * size))] * size


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_sends_what_the_others_have_and_as_much_either_way(size: int) -> None:
    for rank in range(size):
        sent = Counter[int]()
        for hop in ring_hops(rank, size):
            for parcel in hop.sends:
                sent[parcel.peer] += len(parcel.pieces(size))
        assert sum(sent.values()) == 2 * (size - 1)
        if size > 2:
            assert sent == {(rank + 1) % size: size - 1, (rank - 1) % size: size - 1}


@pytest.mark.parametrize("size", SIZES)
def test_a_hop_has_one_parcel_for_a_peer_in_their_order(size: int) -> None:
    for rank in range(size):
        for hop in ring_hops(rank, size):
            for parcels in (hop.sends, hop.receives):
                peers = [parcel.peer for parcel in parcels]
                assert peers == sorted(set(peers))
                assert rank not in peers


@pytest.mark.parametrize("size", SIZES)
def test_causal_work_is_even(size: int) -> None:
    """A query of a later piece sees all of an earlier one, and half of its own."""
    work = [sum(piece + 0.5 for piece in pieces_of(rank, size)) for rank in range(size)]
    assert set(work) == {size * 1.0 * (2 * size) / size}
