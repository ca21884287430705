"""Experts over ranks: the bits of one rank, the bytes of the routing, and errors on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import pytest
import torch
from torch import Tensor

from slipstream.comm.collectives import Collectives, Work
from slipstream.comm.errors import CommMisuse
from slipstream.comm.expert_map import ExpertMap, even_map
from slipstream.comm.expert_traffic import LevelTraffic, traffic
from slipstream.comm.experts import Mixed, Products, dispatch, mix
from slipstream.comm.local_groups import local_group
from slipstream.comm.overlap import Steps, run_interleaved, run_plain
from slipstream.kernels.moe_mlp import expert_products
from slipstream.tests.fakes.expert_ranks import (
    HIDDEN,
    INNER,
    Experts,
    LocalLevels,
    Tokens,
    all_tokens,
    make_experts,
    make_tokens,
    replicated,
)

EXPERTS = 10
"""Does not divide by 3 or 4: the last rank then has empty slots."""
FLAT = [(1,), (2,), (3,), (4,)]
LEVELS = [*FLAT, (2, 2), (2, 1), (1, 3), (2, 3)]
TOKENS = (5, 0, 3, 1, 0, 9)
NO_TOKENS = (0, 0, 0, 0, 0, 0)
TWO_TOKENS = (0, 2, 0, 0, 0, 0)


def chances(name: str, top_k: int) -> Tensor:
    """Return how likely each expert is: at least ``top_k`` have a chance."""
    likely = torch.zeros(EXPERTS)
    match name:
        case "even":
            likely[:] = 1
        case "skewed":
            likely[:] = 0.5 ** torch.arange(EXPERTS)
        case "few":
            # With one choice all tokens go to one expert, and most experts are empty.
            likely[EXPERTS - top_k :] = 1
    return likely


def mix_all(groups: LocalLevels, tokens: Sequence[Tokens], placed: ExpertMap, experts: Experts) -> list[Mixed]:
    def body(rank: int, levels: list[Collectives]) -> Mixed:
        mine = tokens[rank]
        products = experts.of_rank(placed, rank)
        return run_plain(mix(levels, mine.x, mine.weights, mine.experts, placed=placed, products=products))

    return groups.run(body)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["even", "skewed", "few"])
@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("sizes", LEVELS)
def test_the_bits_of_one_rank(sizes: tuple[int, ...], top_k: int, name: str, dtype: torch.dtype, seed: int) -> None:
    """Experts' results depend on their rows' company here, so the order of rows is that of one rank, too."""
    ranks = prod(sizes)
    experts = make_experts(seed, EXPERTS, dtype=dtype)
    groups = LocalLevels(sizes)
    for counts in (TOKENS, TWO_TOKENS, NO_TOKENS):
        tokens = make_tokens(seed + 1, counts[:ranks], chances(name, top_k), top_k=top_k, dtype=dtype)
        found = mix_all(groups, tokens, even_map(EXPERTS, ranks=ranks), experts)
        whole = all_tokens(tokens)
        expected = experts.on_one_rank(whole.x, whole.weights, whole.experts)
        assert torch.equal(torch.cat([one.output_TH for one in found]), expected)
        for one, mine in zip(found, tokens, strict=True):
            assert one.load_E.tolist() == [int((mine.experts == expert).sum()) for expert in range(EXPERTS)]


@pytest.mark.parametrize("top_k", [1, 3, 8])
@pytest.mark.parametrize("sizes", [*FLAT, (2, 2), (2, 3)])
def test_the_bytes_are_those_of_the_routing(sizes: tuple[int, ...], top_k: int, seed: int) -> None:
    ranks = prod(sizes)
    groups = LocalLevels(sizes)
    placed = even_map(EXPERTS, ranks=ranks)
    tokens = make_tokens(seed, TOKENS[:ranks], chances("skewed", top_k), top_k=top_k, dtype=torch.float32)
    mix_all(groups, tokens, placed, make_experts(seed, EXPERTS))
    levels = traffic([one.experts for one in tokens], placed, sizes=sizes)
    others = 1 - torch.eye(ranks, dtype=torch.int64)
    for number, level in enumerate(levels):
        expected = level.bytes_there(4 * HIDDEN) + level.bytes_back(4 * HIDDEN)
        assert torch.equal(groups.sent(number), expected * others)
    if len(sizes) == 1:
        check_flat(levels[0], tokens, placed.slots_per_rank)
    else:
        check_hosts(levels, tokens, placed.slots_per_rank, sizes[1])


def check_flat(level: LevelTraffic, tokens: Sequence[Tokens], slots_per_rank: int) -> None:
    """Count again, token by token."""
    for source, mine in enumerate(tokens):
        for to in range(len(tokens)):
            wanted = [[slot // slots_per_rank for slot in chosen].count(to) for chosen in mine.experts.tolist()]
            assert level.rows_NN[source, to] == sum(count > 0 for count in wanted)
            top_k = mine.experts.shape[1]
            assert level.entries_NN[source, to] == sum(1 if count == top_k else count for count in wanted)


def check_hosts(levels: Sequence[LevelTraffic], tokens: Sequence[Tokens], slots_per_rank: int, width: int) -> None:
    """Count again, by hosts: a token goes once to each host with experts of its, to the rank with the same place."""
    across, inside = levels
    for source, mine in enumerate(tokens):
        hosts = [{slot // slots_per_rank // width for slot in chosen} for chosen in mine.experts.tolist()]
        for host in range(len(tokens) // width):
            relay = host * width + source % width
            assert across.rows_NN[source, relay] == sum(host in wanted for wanted in hosts) <= len(mine.x)
        assert across.rows_NN[source].sum() == sum(map(len, hosts))
    for source in range(len(tokens)):
        for to in range(len(tokens)):
            assert source // width == to // width or inside.rows_NN[source, to] == 0


@pytest.mark.parametrize("sizes", [(2,), (2, 2)])
def test_float8_rows_travel_as_they_are(sizes: tuple[int, ...], seed: int) -> None:
    """Experts take rows in 8 bits and answer in 32."""
    ranks = prod(sizes)
    placed = even_map(EXPERTS, ranks=ranks)
    experts = make_experts(seed, EXPERTS)
    groups = LocalLevels(sizes)
    tokens = make_tokens(seed, TOKENS[:ranks], chances("even", 2), top_k=2, dtype=torch.float8_e4m3fn)

    def body(rank: int, levels: list[Collectives]) -> Tensor:
        mine = tokens[rank]
        plain = experts.of_rank(placed, rank)
        products: Products = lambda rows, counts: plain(rows.float(), counts)  # noqa: E731
        steps = mix(levels, mine.x, mine.weights, mine.experts, placed=placed, products=products)
        return run_plain(steps).output_TH

    found = torch.cat(groups.run(body))
    x = torch.cat([one.x.float() for one in tokens])
    whole = all_tokens([Tokens(one.x.float(), one.weights, one.experts) for one in tokens])
    assert found.dtype == torch.float32
    assert torch.equal(found, experts.on_one_rank(x, whole.weights, whole.experts))
    level = traffic([one.experts for one in tokens], placed, sizes=sizes)[0]
    expected = level.bytes_there(HIDDEN) + level.bytes_back(4 * HIDDEN)
    assert torch.equal(groups.sent(0), expected * (1 - torch.eye(ranks, dtype=torch.int64)))


@pytest.mark.parametrize("sizes", [(3,), (2, 2)])
def test_maps_may_change_between_steps(sizes: tuple[int, ...], seed: int) -> None:
    ranks = prod(sizes)
    experts = make_experts(seed, EXPERTS, company=False)
    groups = LocalLevels(sizes)
    maps = [even_map(EXPERTS, ranks=ranks), replicated(seed, EXPERTS, ranks), replicated(seed + 1, EXPERTS, ranks)]
    tokens = make_tokens(seed, TOKENS[:ranks], chances("skewed", 3), top_k=3, dtype=torch.float32)
    whole = all_tokens(tokens)
    expected = experts.on_one_rank(whole.x, whole.weights, whole.experts)
    for placed in (*maps, maps[0]):
        found = mix_all(groups, tokens, placed, experts)
        assert torch.equal(torch.cat([one.output_TH for one in found]), expected)
        assert sum(one.load_E[0] for one in found) == (whole.experts == 0).sum(), "by expert, not by replica"


def errors_of(groups: LocalLevels, body: Callable[[int, list[Collectives]], object]) -> list[CommMisuse]:
    """Return the misuse that each rank met by itself: no rank's end tells the others."""

    def caught(rank: int, levels: list[Collectives]) -> CommMisuse:
        with pytest.raises(CommMisuse) as error:
            body(rank, levels)
        return error.value

    return groups.run(caught)


@pytest.mark.parametrize("sizes", [(3,), (2, 2)])
def test_ranks_with_different_maps_find_out_before_a_row_is_sent(sizes: tuple[int, ...], seed: int) -> None:
    ranks = prod(sizes)
    experts = make_experts(seed, EXPERTS)
    tokens = make_tokens(seed, TOKENS[:ranks], chances("even", 2), top_k=2, dtype=torch.float32)
    # On two levels the ranks of both hosts differ.
    maps = [replicated(seed + (rank >= ranks // 2), EXPERTS, ranks) for rank in range(ranks)]

    def body(rank: int, levels: list[Collectives]) -> object:
        mine = tokens[rank]
        products = experts.of_rank(maps[rank], rank)
        return run_plain(mix(levels, mine.x, mine.weights, mine.experts, placed=maps[rank], products=products))

    groups = LocalLevels(sizes)
    for error in errors_of(groups, body):
        assert "uses another map of experts; switch maps on all ranks" in str(error)
    assert groups.sent(0).max() == 4 * 8, "the counts, and nothing else"


def test_rows_of_different_sizes_are_refused_on_all_ranks(seed: int) -> None:
    placed = even_map(EXPERTS, ranks=2)

    def body(rank: int, levels: list[Collectives]) -> object:
        x = torch.zeros((1, HIDDEN + rank))
        choice = torch.zeros((1, 1), dtype=torch.int64)
        products = make_experts(seed, EXPERTS).of_rank(placed, rank)
        return run_plain(mix(levels, x, torch.ones((1, 1)), choice, placed=placed, products=products))

    for rank, error in enumerate(errors_of(LocalLevels((2,)), body)):
        assert f"rank {1 - rank} sends rows of {4 * (HIDDEN + 1 - rank)} bytes" in str(error)


def run_alone(
    x: Tensor, weights: Tensor, experts: Tensor, *, ranks: int = 1, products: Products | None = None
) -> Mixed:
    placed = even_map(EXPERTS, ranks=ranks)
    multiply = make_experts(0, EXPERTS).of_rank(placed, 0) if products is None else products
    return run_plain(mix(local_group(1), x, weights, experts, placed=placed, products=multiply))


def test_operands_that_do_not_fit_are_named() -> None:
    x, weights, experts = torch.zeros((3, HIDDEN)), torch.zeros((3, 2)), torch.zeros((3, 2), dtype=torch.int64)
    with pytest.raises(CommMisuse, match="the map of experts is for 2 ranks, the levels have 1"):
        run_alone(x, weights, experts, ranks=2)
    with pytest.raises(CommMisuse, match=r"3 tokens need weights and experts \[3, chosen\], got \[3, 2\] and \[2, 2\]"):
        run_alone(x, weights, experts[:2])
    with pytest.raises(CommMisuse, match=r"4 tokens need weights and experts \[4, chosen\]"):
        run_alone(torch.zeros((4, HIDDEN)), weights, experts)
    with pytest.raises(CommMisuse, match=r"int64, and float32 weights, are due; got 2 as torch.int32"):
        run_alone(x, weights, experts.int())
    with pytest.raises(CommMisuse, match=r"and torch.bfloat16"):
        run_alone(x, weights.bfloat16(), experts)
    with pytest.raises(CommMisuse, match=r"at least one expert per token"):
        run_alone(x, weights[:, :0], experts[:, :0])
    with pytest.raises(CommMisuse, match=r"experts made 5 rows of 6; one each is due"):
        run_alone(x, weights, experts, products=lambda rows, counts: rows[1:])
    with pytest.raises(IndexError):
        run_alone(x, weights, experts + EXPERTS)


class Recorded:
    """A group of one that writes down what is called, begun and waited for, in order."""

    def __init__(self) -> None:
        (self._group,) = local_group(1)
        self.story: list[str] = []
        self.name, self.rank, self.size = self._group.name, 0, 1

    def all_to_all(self, x: Tensor, *, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Work:
        self.story.append("begin")
        work = self._group.all_to_all(x, send_counts=send_counts, receive_counts=receive_counts)
        return RecordedWork(work, self.story)


class RecordedWork:
    def __init__(self, work: Work, story: list[str]) -> None:
        self._work = work
        self._story = story

    def wait(self, timeout_s: float | None = None) -> Tensor:
        self._story.append("wait")
        return self._work.wait(timeout_s)

    def done(self) -> bool:
        return self._work.done()


@pytest.mark.parametrize("count", [0, 4])
def test_shared_experts_run_while_rows_are_on_their_way(count: int, seed: int) -> None:
    (mine,) = make_tokens(seed, (count,), chances("even", 2), top_k=2, dtype=torch.float32)
    placed = even_map(EXPERTS, ranks=1)
    experts = make_experts(seed, EXPERTS)
    group = Recorded()

    def shared() -> Tensor:
        group.story.append("shared")
        return mine.x * 2

    steps = mix(
        [group],  # type: ignore[list-item]  # it has what the exchange uses
        mine.x,
        mine.weights,
        mine.experts,
        placed=placed,
        products=experts.of_rank(placed, 0),
        shared=shared,
    )
    found = run_plain(steps).output_TH
    # Counts; lists and rows; lists again, which are there; results. The same operations however many tokens there are.
    assert group.story == ["begin", "wait", "begin", "begin", "shared", "wait", "wait", "wait", "begin", "wait"]
    assert torch.equal(found, experts.on_one_rank(mine.x, mine.weights, mine.experts) + mine.x * 2)


class Garbled(Recorded):
    """A group of one from which counts come back changed."""

    def __init__(self, rows: int, entries: int) -> None:
        super().__init__()
        self._counts = torch.tensor([rows, entries])

    def all_to_all(self, x: Tensor, *, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Work:
        garbled = x.clone()
        garbled[:, :2] = self._counts
        return super().all_to_all(garbled, send_counts=send_counts, receive_counts=receive_counts)


@pytest.mark.parametrize(("rows", "entries"), [(5, 4), (0, 4), (4, 0), (-1, 4)])
def test_counts_that_cannot_be_are_refused(rows: int, entries: int, seed: int) -> None:
    (mine,) = make_tokens(seed, (4,), chances("even", 2), top_k=2, dtype=torch.float32)
    group = Garbled(rows, entries)
    steps = dispatch(
        [group],  # type: ignore[list-item]  # it has what the exchange uses
        mine.x,
        mine.weights,
        mine.experts,
        placed=even_map(EXPERTS, ranks=1),
    )
    with pytest.raises(CommMisuse, match=f"rank 0 announces {rows} rows for {entries} entries"):
        run_plain(steps)


@pytest.mark.parametrize("sizes", [(2,), (2, 2)])
def test_two_parts_of_the_tokens_take_turns(sizes: tuple[int, ...], seed: int) -> None:
    ranks = prod(sizes)
    experts = make_experts(seed, EXPERTS, company=False)
    placed = even_map(EXPERTS, ranks=ranks)
    tokens = make_tokens(seed, TOKENS[:ranks], chances("even", 3), top_k=3, dtype=torch.float32)
    turns: list[list[str]] = [[] for _ in range(ranks)]

    def body(rank: int, levels: list[Collectives]) -> Tensor:
        mine = tokens[rank]
        plain = experts.of_rank(placed, rank)

        def part(name: str, kept: slice) -> Steps[Mixed]:
            def products(rows: Tensor, counts: Tensor) -> Tensor:
                turns[rank].append(f"experts {name}")
                return plain(rows, counts)

            def shared() -> Tensor:
                turns[rank].append(f"shared {name}")
                return mine.x[kept]

            x, weights, chosen = mine.x[kept], mine.weights[kept], mine.experts[kept]
            return mix(levels, x, weights, chosen, placed=placed, products=products, shared=shared)

        cut = len(mine.x) // 2
        first, second = run_interleaved([part("1", slice(0, cut)), part("2", slice(cut, None))])
        return torch.cat([first.output_TH, second.output_TH])

    found = torch.cat(LocalLevels(sizes).run(body))
    whole = all_tokens(tokens)
    assert torch.equal(found, experts.on_one_rank(whole.x, whole.weights, whole.experts) + whole.x)
    assert all(turn == ["shared 1", "shared 2", "experts 1", "experts 2"] for turn in turns)


def slice_of(experts: Experts, tp: int) -> Experts:
    """Return one half of every expert: half of gate, half of up, the columns of down that belong to them."""
    half = slice(tp * INNER // 2, (tp + 1) * INNER // 2)
    gate, up = experts.gate_up.split(INNER, dim=1)
    return Experts(torch.cat([gate[:, half], up[:, half]], dim=1), experts.down[:, :, half].contiguous(), False)


def test_experts_spread_over_tensor_parallel_ranks(seed: int) -> None:
    """ep 2 x tp 2: the two tp ranks have the same tokens and a half of each expert, and add up what comes of it."""
    experts = make_experts(seed, EXPERTS, company=False)
    placed = even_map(EXPERTS, ranks=2)
    tokens = make_tokens(seed, (5, 3), chances("even", 4), top_k=4, dtype=torch.float32)
    # Ranks count with tp fastest: the two levels' groups are those of ep and of tp.
    groups = LocalLevels((2, 2))

    def body(rank: int, levels: list[Collectives]) -> Tensor:
        ep_group, tp_group = levels
        mine = tokens[ep_group.rank]
        products = slice_of(experts, tp_group.rank).of_rank(placed, ep_group.rank)
        steps = mix([ep_group], mine.x, mine.weights, mine.experts, placed=placed, products=products)
        return tp_group.all_reduce(run_plain(steps).output_TH).wait()

    found = groups.run(body)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])
    whole = all_tokens(tokens)
    expected = experts.on_one_rank(whole.x, whole.weights, whole.experts)
    assert torch.allclose(torch.cat([found[0], found[2]]), expected, atol=1e-5)


def test_the_products_of_one_rank_take_counts_from_the_exchange(seed: int) -> None:
    """Rows behind the counted ones are padding and are not computed."""
    experts = make_experts(seed, 2)
    rows = torch.randn((5, HIDDEN), generator=torch.Generator().manual_seed(seed))
    products = partial(
        expert_products,
        gate_up=[experts.gate_up_of(expert) for expert in range(2)],
        down=[experts.down_of(expert) for expert in range(2)],
    )
    padded = products(rows, torch.tensor([1, 2]))
    assert padded.shape == rows.shape
    assert torch.equal(padded[:3], products(rows[:3], torch.tensor([1, 2])))
