"""What goes round, over groups of threads: every rank gets what all have, and exactly the bytes pass that have to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slipstream.comm.collectives import Collectives
from slipstream.comm.local_groups import BytesSent, local_group, run_ranks
from slipstream.comm.ring import RingPass
from slipstream.comm.ring_order import pieces_of, ring_hops

WIDTH = 3


def piece(number: int, tokens: int) -> Tensor:
    return torch.arange(tokens * WIDTH, dtype=torch.float32).view(tokens, WIDTH) + 1000 * number


def pass_round(group: Collectives, tokens: list[int]) -> dict[int, Tensor]:
    """Return the pieces that a rank has in the end."""
    own = pieces_of(group.rank, group.size)
    found = {number: piece(number, tokens[number]) for number in own}
    passing = RingPass(group, torch.cat([found[number] for number in own]), tokens)
    for hop in ring_hops(group.rank, group.size):
        received = passing.begin(hop).wait()
        passing.take(hop, received)
        numbers = [number for parcel in hop.receives for number in parcel.pieces(group.size)]
        found |= dict(zip(numbers, received.split([tokens[number] for number in numbers]), strict=True))
    return found


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("even", [True, False])
def test_every_rank_gets_every_piece(size: int, even: bool) -> None:
    tokens = [4 if even else 2 + (5 * number) % 7 for number in range(2 * size)]
    sent = BytesSent()
    for found in run_ranks(local_group(size, bytes_sent=sent), lambda group: pass_round(group, tokens)):
        assert sorted(found) == list(range(2 * size))
        for number, rows in found.items():
            assert rows.equal(piece(number, tokens[number]))
    row_bytes = WIDTH * 4
    # Everything comes to every rank once, but for what it had.
    total = sum(tokens) * row_bytes
    assert sum(sent.values()) == (size - 1) * total
    if even:
        own_bytes = 2 * 4 * row_bytes
        for rank in range(size):
            assert sum(count for (source, _), count in sent.items() if source == rank) == (size - 1) * own_bytes
        neighbours = {(rank, (rank + step) % size) for rank in range(size) for step in (1, -1)}
        assert set(+sent) == neighbours
