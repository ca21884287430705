"""A layer's experts on ranks: both ways and both levels give the same bits, and bytes between hosts are those due."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slipstream.comm.expert_gather import share_of
from slipstream.comm.expert_map import ExpertMap, map_of
from slipstream.comm.expert_traffic import LevelTraffic, traffic
from slipstream.comm.groups import MeshGroups
from slipstream.comm.local_groups import run_ranks
from slipstream.comm.mesh import MeshShape
from slipstream.comm.overlap import run_plain
from slipstream.kernels.moe_route import route
from slipstream.placement.expert_counts import count_together
from slipstream.placement.expert_plan import first_placement
from slipstream.runtime.models.expert_ranks import ALWAYS, NEVER, ExpertRanks
from slipstream.tests.fakes.expert_ranks import HIDDEN, Experts, make_experts
from slipstream.tests.fakes.thread_peers import SentByGroup, local_mesh

EXPERTS, TOP_K, RANKS = 8, 3, 4
HOSTS = {"one": None, "two": 2}


class Layer:
    """A layer with its ranks as threads."""

    def __init__(self, seed: int, ranks_per_host: int | None, *, in_levels: bool = True) -> None:
        self.sent: SentByGroup = {}
        shape = MeshShape(ep=RANKS, ranks_per_host=ranks_per_host)
        self.mesh = local_mesh(shape, sent=self.sent)
        placement = first_placement(EXPERTS, RANKS, ranks_per_host=ranks_per_host or RANKS, spare_slots=4)
        self.placed = map_of(placement, 0)
        self.experts = make_experts(seed, EXPERTS, company=True)
        draw = torch.Generator().manual_seed(seed)
        self._router_EH = torch.randn((EXPERTS, HIDDEN), generator=draw)
        self.ranks = [_on_rank(groups, self.placed, self.experts, in_levels) for groups in self.mesh]

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        return route(x_TH, self._router_EH, top_k=TOP_K, normalize=True)

    def run(self, x_TH: Tensor) -> list[Tensor]:
        """Return what every rank comes to."""
        seats = [groups.ep for groups in self.mesh if groups.ep is not None]
        return run_ranks(seats, lambda seat: run_plain(self.ranks[seat.rank].mix(x_TH, self.route)))

    def choices(self, x_TH: Tensor) -> list[Tensor]:
        return [self.route(x_TH[share_of(len(x_TH), rank, RANKS)])[1] for rank in range(RANKS)]

    def across_hosts(self) -> Tensor:
        """Return the bytes that ranks have sent across hosts. [ranks, ranks], sender first"""
        total = torch.zeros((RANKS, RANKS), dtype=torch.int64)
        for (axis, ranks), counter in self.sent.items():
            if axis == "across":
                for (source, to), count in counter.items():
                    total[ranks[source], ranks[to]] += count
        return total


def _on_rank(groups: MeshGroups, placed: ExpertMap, experts: Experts, in_levels: bool) -> ExpertRanks:
    assert groups.ep is not None
    held = placed.experts_NS[groups.ep.rank].tolist()
    slots = tuple((experts.gate_up_of(expert), experts.down_of(expert)) for expert in held)
    levels = groups.expert_levels if in_levels else ()
    return ExpertRanks(groups.ep, placed, slots, columns_group=None, levels=levels)


def tokens_of(seed: int, count: int) -> Tensor:
    return torch.randn((count, HIDDEN), generator=torch.Generator().manual_seed(seed + count))


@pytest.mark.parametrize("hosts", HOSTS)
def test_a_layer_may_go_another_way_at_every_step(hosts: str, seed: int) -> None:
    layer = Layer(seed, HOSTS[hosts])
    ways = {"exchanged": [NEVER] * 6, "gathered": [ALWAYS] * 6, "by the number of tokens": [4] * 6}
    ways["in turns"] = [NEVER, ALWAYS] * 3
    found: dict[str, list[Tensor]] = {}
    for name, most in ways.items():
        outputs = []
        for step, count in enumerate((9, 1, 4, 30, 2, 5)):
            for rank in layer.ranks:
                rank.most_gathered = most[step]
            first, *others = layer.run(tokens_of(seed, count))
            assert all(torch.equal(first, other) for other in others)
            outputs.append(first)
        found[name] = outputs
    for outputs in found.values():
        assert all(map(torch.equal, outputs, found["exchanged"]))


def test_two_levels_give_the_bits_of_one(seed: int) -> None:
    over_two = Layer(seed, 2)
    flat = Layer(seed, 2, in_levels=False)
    for most in (NEVER, ALWAYS):
        for rank in (*over_two.ranks, *flat.ranks):
            rank.most_gathered = most
        for count in (1, 6, 21):
            x_TH = tokens_of(seed, count)
            assert torch.equal(over_two.run(x_TH)[0], flat.run(x_TH)[0])
    assert flat.across_hosts().sum() == 0 < over_two.across_hosts().sum()


def test_each_token_crosses_to_each_host_once(seed: int) -> None:
    layer, count = Layer(seed, 2), 24
    x_TH = tokens_of(seed, count)
    layer.run(x_TH)
    across, _ = traffic(layer.choices(x_TH), layer.placed, sizes=(2, 2))
    assert 0 < across.moved_rows <= count, "to one other host"
    row_bytes = 4 * HIDDEN
    outputs = 6 * row_bytes * across.joined_NN
    expected = across.bytes_there(row_bytes) + across.bytes_back(row_bytes) + outputs
    assert torch.equal(layer.across_hosts(), expected * (1 - torch.eye(RANKS, dtype=torch.int64)))
    # So do the outputs: counted above once for each pair of counterparts, not for each rank of the other host.
    flat: LevelTraffic = traffic(layer.choices(x_TH), layer.placed, sizes=(4,))[0]
    assert across.moved_rows < flat.rows_between_hosts(2)


@pytest.mark.parametrize("most", [NEVER, ALWAYS])
def test_loads_and_pairs_are_counted_whichever_way(most: int, seed: int) -> None:
    layer = Layer(seed, None)
    for rank in layer.ranks:
        rank.most_gathered = most
        rank.count_pairs()
    chosen: list[list[int]] = []
    for count in (3, 17):
        x_TH = tokens_of(seed, count)
        layer.run(x_TH)
        chosen += torch.cat(layer.choices(x_TH)).tolist()
    loads = sum(rank.load_E for rank in layer.ranks)
    assert isinstance(loads, Tensor)
    assert loads.tolist() == [sum(expert in one for one in chosen) for expert in range(EXPERTS)]
    pairs = sum(_pairs_of(rank) for rank in layer.ranks)
    assert isinstance(pairs, Tensor)
    assert pairs.fill_diagonal_(0).tolist() == count_together(chosen, EXPERTS)


def test_pairs_of_many_tokens_are_those_of_a_sample(seed: int) -> None:
    layer = Layer(seed, None)
    layer.ranks[0].count_pairs()
    layer.run(tokens_of(seed, 4 * 200))
    assert _pairs_of(layer.ranks[0]).sum() == 50 * TOP_K * TOP_K, "every fourth of its 200"


def _pairs_of(rank: ExpertRanks) -> Tensor:
    assert rank.pairs_EE is not None
    return rank.pairs_EE


def test_one_token_and_fewer_than_ranks(seed: int) -> None:
    layer = Layer(seed, 2)
    for count in (1, 2, 3):
        assert {tuple(output.shape) for output in layer.run(tokens_of(seed, count))} == {(count, HIDDEN)}
