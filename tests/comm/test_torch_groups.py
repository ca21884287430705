"""Groups over gloo keep the contract between real processes, and are opened again in living ones."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator

import pytest

from slipstream.comm.errors import CommMisuse, CommTimeout
from slipstream.comm.torch_groups import Rendezvous
from slipstream.tests.comm.rank_acts import all_axes, levels_over_hosts
from slipstream.tests.comm.ranks import LOOPBACK, RankProcess, meet, name_of, open_together, result_of, together
from slipstream.tests.contracts.collectives import SIZES, CollectivesContract, Scenario

_generations = itertools.count()


@pytest.fixture(scope="module")
def processes() -> Iterator[list[RankProcess]]:
    """Processes that stay for all tests of this module: every test opens groups anew in them."""
    ranks = [RankProcess() for _ in range(max(SIZES))]
    try:
        for rank in ranks:
            rank.hear("ready")
        meet(ranks)
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()


class TestGlooGroups(CollectivesContract):
    @pytest.fixture(autouse=True)
    def _processes(self, processes: list[RankProcess]) -> None:
        self.processes = processes

    def run(self, size: int, scenario: Scenario, seed: int, *, timeout_s: float = 30.0) -> list[object]:
        ranks = self.processes[:size]
        open_together(ranks, generation=next(_generations), timeout_s=timeout_s)
        arguments = {"name": "group", "scenario": name_of(scenario), "seed": seed}
        answers = together(ranks, "run", lambda _: arguments)
        together(ranks, "close", lambda _: {})
        return [result_of(answer) for answer in answers]


@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 1, 2), (1, 2, 2), (2, 2, 1), (4, 1, 1)])
def test_a_mesh_has_its_groups(processes: list[RankProcess], shape: tuple[int, int, int]) -> None:
    pp, ep, tp = shape
    generation = next(_generations)
    mesh = {"pp": pp, "ep": ep, "tp": tp, "generation": generation, "address": LOOPBACK}
    for answer in together(processes, "open_mesh", lambda rank: {**mesh, "rank": rank}):
        result_of(answer)
    answers = together(processes, "act", lambda _: {"act": name_of(all_axes)})
    together(processes, "close", lambda _: {})
    for rank, answer in enumerate(answers):
        seen = result_of(answer)
        stage, within = divmod(rank, ep * tp)
        assert seen == {
            "world": list(range(4)),
            "stage": list(range(stage * ep * tp, (stage + 1) * ep * tp)),
            "pp": [other * ep * tp + within for other in range(pp)],
            "ep": [stage * ep * tp + other * tp + within % tp for other in range(ep)],
            "tp": [rank - within % tp + other for other in range(tp)],
        }


@pytest.mark.parametrize(
    ("ranks_per_host", "levels"),
    [(2, [[[0, 2], [0, 1]], [[1, 3], [0, 1]], [[0, 2], [2, 3]], [[1, 3], [2, 3]]]), (4, [[]] * 4), (1, [[]] * 4)],
)
def test_experts_on_several_hosts_have_levels(
    processes: list[RankProcess], ranks_per_host: int, levels: list[list[list[int]]]
) -> None:
    arguments = {"ranks_per_host": ranks_per_host, "generation": next(_generations), "address": LOOPBACK}
    act = name_of(levels_over_hosts)
    answers = together(processes, "act", lambda rank: {"act": act, "place": rank, **arguments})
    together(processes, "close", lambda _: {})
    assert [result_of(answer) for answer in answers] == levels


def test_a_rank_that_does_not_come(processes: list[RankProcess]) -> None:
    generation = next(_generations)
    arguments = {
        "name": "group", "generation": generation, "size": 3, "address": LOOPBACK, "timeout_s": 5.0,
        "open_timeout_s": 0.5,
    }  # fmt: skip
    answers = together(processes[:2], "open", lambda rank: {**arguments, "rank": rank})
    for rank, answer in enumerate(answers):
        assert answer.error == "CommTimeout", answer.traceback
        assert f"group group: open at rank {rank} of 3: some rank did not come within 0.5 s" in answer.message
    open_together(processes[:2], generation=next(_generations))
    together(processes[:2], "close", lambda _: {})


def test_nobody_hosts() -> None:
    free = Rendezvous.host(LOOPBACK, timeout_s=5.0)
    port = free.port
    with pytest.raises(CommMisuse, match=f"cannot listen on {LOOPBACK}:{port}"):
        Rendezvous.host(LOOPBACK, port, timeout_s=5.0)
    free.close()
    with pytest.raises(CommMisuse, match="it was closed"):
        free.store("x", timeout_s=1.0)
    with pytest.raises(CommTimeout, match=f"nobody answered at {LOOPBACK}:{port} within 0.5 s"):
        Rendezvous.join(LOOPBACK, port, timeout_s=0.5)


def test_a_rendezvous_is_reached_at_its_address_only() -> None:
    meeting = Rendezvous.host(LOOPBACK, timeout_s=5.0)
    Rendezvous.join(LOOPBACK, meeting.port, timeout_s=5.0).close()
    # Another address of the same host: a store that listens everywhere would answer there.
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.2", meeting.port), timeout=5.0):
        pass
    meeting.close()


def test_a_rendezvous_at_an_address_of_another_host() -> None:
    with pytest.raises(CommMisuse, match=r"cannot listen on 192\.0\.2\.1:0: Cannot assign"):
        Rendezvous.host("192.0.2.1", timeout_s=5.0)
