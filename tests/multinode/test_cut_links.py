"""Ranks on hosts of their own, with slow links, so that what happens does so in the middle of a transfer.

Of a cut link nobody hears, so the deadline must end the wait; of a killed rank all hear, though the transfers that wait
for it are half-way.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from slipstream.tests.comm.rank_acts import OPERATIONS, start_and_wait
from slipstream.tests.comm.ranks import RankProcess, meet, name_of, open_together, result_of, together
from slipstream.tests.contracts.collectives import anything_in_any_order
from slipstream.tests.multinode.namespaces import Host, hosts, missing

DEADLINE_S = 1.0

LOADED_S = 10.0
"""What a loaded machine may take beyond a deadline, or over what is seen at once."""

NEVER_S = 120.0

NUMBERS = 16_000_000
"""64 MB: more than the links carry within the deadline."""

MBIT_PER_S = 100.0

_generations = itertools.count()


@pytest.fixture(scope="module")
def network() -> Iterator[tuple[tuple[Host, ...], list[RankProcess]]]:
    """Three hosts with slow links, and a rank on each."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with hosts(3, mbit_per_s=MBIT_PER_S) as made:
        ranks = [RankProcess(host) for host in made]
        try:
            for rank in ranks:
                rank.hear("ready")
            meet(ranks)
            yield made, ranks
        finally:
            for rank in ranks:
                rank.kill()


def start(ranks: list[RankProcess], operation: str, *, timeout_s: float) -> None:
    """Have ranks open a group and start what takes long; return when all have."""
    open_together(ranks, generation=next(_generations), timeout_s=timeout_s)
    for rank in ranks:
        rank.tell("act", act=name_of(start_and_wait), operation=operation, numbers=NUMBERS)
    for rank in ranks:
        rank.hear("started")


def works(ranks: list[RankProcess], seed: int) -> None:
    """Have ranks close what they have, open a group and use it."""
    together(ranks, "close", lambda _: {})
    open_together(ranks, generation=next(_generations))
    arguments = {"name": "group", "scenario": name_of(anything_in_any_order), "seed": seed}
    for answer in together(ranks, "run", lambda _: arguments):
        result_of(answer)
    together(ranks, "close", lambda _: {})


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_cut_link(network: tuple[tuple[Host, ...], list[RankProcess]], operation: str, seed: int) -> None:
    made, ranks = network
    start(ranks, operation, timeout_s=DEADLINE_S)
    made[2].cut()
    try:
        answers = [rank.answer() for rank in ranks]
    finally:
        made[2].heal()
    for place, answer in enumerate(answers):
        assert answer.error in ("CommTimeout", "PeerLost"), answer.traceback
        assert f"at rank {place} of 3" in answer.message
        assert answer.took_s < DEADLINE_S + LOADED_S, f"{answer.message}, after {answer.took_s:.1f} s"
    assert answers[2].error == "CommTimeout", "who is cut off hears nothing of the others"
    works(ranks, seed)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_rank_killed_half_way(network: tuple[tuple[Host, ...], list[RankProcess]], operation: str, seed: int) -> None:
    made, ranks = network
    start(ranks, operation, timeout_s=NEVER_S)
    ranks[2].kill()
    ranks[2] = RankProcess(made[2])
    for place, rank in enumerate(ranks[:2]):
        answer = rank.answer()
        assert answer.error == "PeerLost", answer.traceback
        assert f"at rank {place} of 3" in answer.message
        assert answer.took_s < LOADED_S, f"{answer.message}, after {answer.took_s:.1f} s"
    ranks[2].hear("ready")
    ranks[2].do("join", address=ranks[0].address, port=ranks[0].port)
    works(ranks, seed)


def test_links_are_shaped_and_healed_as_asked(network: tuple[tuple[Host, ...], list[RankProcess]]) -> None:
    """8 MB take their time on a slow link, and less when the limit is lifted."""
    made, ranks = network
    open_together(ranks, generation=next(_generations))
    took_s = []
    for limit in (MBIT_PER_S, None):
        for host in made:
            host.shape(mbit_per_s=limit)
        for rank in ranks:
            rank.tell("act", act=name_of(start_and_wait), operation="point_to_point", numbers=2_000_000)
        for rank in ranks:
            rank.hear("started")
        answers = [rank.answer() for rank in ranks]
        for answer in answers:
            result_of(answer)
        took_s.append(max(answer.took_s for answer in answers))
    for host in made:
        host.shape(mbit_per_s=MBIT_PER_S)
    together(ranks, "close", lambda _: {})
    wire_s = 2_000_000 * 4 * 8 / (MBIT_PER_S * 1e6)
    assert took_s[0] > 0.9 * wire_s
    assert took_s[1] < took_s[0]
