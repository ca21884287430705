"""Hosts: which ranks of a group share one, and the levels of an exchange over them."""

from __future__ import annotations

import pytest

from slipstream.comm.host_levels import host_levels, ranks_on_a_host
from slipstream.comm.mesh import MeshShape


@pytest.mark.parametrize(
    ("ranks", "ranks_per_host", "width"),
    [
        ((0, 1, 2, 3), None, 4),
        ((0, 1, 2, 3), 4, 4),
        ((0, 1, 2, 3), 9, 4),
        ((0, 1, 2, 3), 2, 2),
        ((0, 2, 4, 6), 4, 2),
        ((1, 3, 5, 7), 2, 1),
        # The second stage of a pipeline begins in the middle of a host.
        ((2, 3, 4, 5), 4, 2),
    ],
)
def test_ranks_share_hosts(ranks: tuple[int, ...], ranks_per_host: int | None, width: int) -> None:
    assert ranks_on_a_host(ranks, ranks_per_host) == width


def test_hosts_with_different_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="hosts of 3 ranks have 1 and 3 of them; every host needs as many"):
        ranks_on_a_host((0, 1, 2, 3), 3)


@pytest.mark.parametrize("ranks_per_host", [None, 8, 1])
def test_one_host_or_hosts_of_one_rank_are_one_level(ranks_per_host: int | None) -> None:
    assert host_levels((4, 5, 6, 7), 5, ranks_per_host) == ((4, 5, 6, 7),)


def test_a_rank_has_its_counterparts_and_its_neighbours() -> None:
    place = MeshShape(ep=6, tp=2, ranks_per_host=4).place(5)
    assert place.ep_ranks == (1, 3, 5, 7, 9, 11)
    assert host_levels(place.ep_ranks, 5, 4) == ((1, 5, 9), (5, 7))
    # Seen from all ranks, each level parts them, and a rank's number counts with the last level fastest.
    for number, rank in enumerate(place.ep_ranks):
        across, inside = host_levels(place.ep_ranks, rank, 4)
        assert across.index(rank) * len(inside) + inside.index(rank) == number


def test_fewer_than_one_rank_on_a_host_is_refused() -> None:
    with pytest.raises(ValueError, match="ranks_per_host must be at least 1, got 0"):
        MeshShape(tp=2, ranks_per_host=0)
