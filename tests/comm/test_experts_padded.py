"""The exchange in fixed shapes: the same bits, nothing read back, and what does not fit is seen by every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from slipstream.comm.collectives import Collectives
from slipstream.comm.errors import CommMisuse
from slipstream.comm.expert_map import ExpertMap, even_map, expert_map
from slipstream.comm.expert_padded import PaddedMix, Room, fits, mix_padded, padded_or_exact
from slipstream.comm.experts import Mixed, Products
from slipstream.comm.local_groups import local_group
from slipstream.comm.overlap import run_plain
from slipstream.kernels.activation import silu_and_mul
from slipstream.tests.fakes.expert_ranks import (
    HIDDEN,
    Experts,
    LocalLevels,
    Tokens,
    all_tokens,
    make_experts,
    make_tokens,
)

EXPERTS = 10
TOKENS = (5, 0, 3, 9)
EVEN = torch.ones(EXPERTS)


def on_one_rank(experts: Experts, tokens: Sequence[Tokens]) -> Tensor:
    whole = all_tokens(tokens)
    return experts.on_one_rank(whole.x, whole.weights, whole.experts)


def needed_room(tokens: Sequence[Tokens], slots_per_rank: int) -> Room:
    """Return what the fullest pair of ranks needs, token by token."""
    rows, entries = [1], [1]
    for mine in tokens:
        for to in range(len(tokens)):
            wanted = [(one // slots_per_rank == to).sum().item() for one in mine.experts]
            rows.append(sum(count > 0 for count in wanted))
            entries.append(int(sum(wanted)))
    return Room(rows=max(rows), entries=max(entries))


def run_padded(
    placed: ExpertMap,
    experts: Experts,
    tokens: Sequence[Tokens],
    room: Room,
    rank: int,
    levels: list[Collectives],
) -> tuple[Tensor, tuple[bool, Room]]:
    """Run one rank; return what came of its tokens, and what the exchange says of its room."""
    (group,), mine, products = levels, tokens[rank], experts.of_rank(placed, rank)
    steps = mix_padded(group, mine.x, mine.weights, mine.experts, placed=placed, products=products, room=room)
    padded = run_plain(steps)
    return padded.routed_TH, fits(padded, group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_bits_of_one_rank(ranks: int, top_k: int, dtype: torch.dtype, seed: int) -> None:
    placed = even_map(EXPERTS, ranks=ranks)
    experts = make_experts(seed, EXPERTS, dtype=dtype)
    for counts in (TOKENS, (0, 1, 0, 0), (0, 0, 0, 0)):
        tokens = make_tokens(seed, counts[:ranks], EVEN, top_k=top_k, dtype=dtype)
        most = max(1, *counts[:ranks])
        enough = Room(rows=most, entries=most * min(top_k, placed.slots_per_rank))
        needed = needed_room(tokens, placed.slots_per_rank)
        for room in (enough, needed):
            groups = LocalLevels((ranks,))

            found = groups.run(partial(run_padded, placed, experts, tokens, room))
            assert torch.equal(torch.cat([routed for routed, _ in found]), on_one_rank(experts, tokens))
            assert all(answer == (True, needed) for _, answer in found)
            size = torch.empty((), dtype=dtype).element_size()
            agreeing = 2 * 8 * -(-4 // ranks)
            sent = agreeing + room.rows * HIDDEN * size + room.entries * (8 + HIDDEN * size)
            assert torch.equal(groups.sent(0), sent * (1 - torch.eye(ranks, dtype=torch.int64)))


@pytest.mark.parametrize("short", ["rows", "entries"])
def test_what_does_not_fit_takes_the_exact_way_on_all_ranks(short: str, seed: int) -> None:
    ranks = 3
    placed = even_map(EXPERTS, ranks=ranks)
    experts = make_experts(seed, EXPERTS)
    # Only the last rank has much to send.
    tokens = make_tokens(seed, (1, 0, 7), EVEN, top_k=4, dtype=torch.float32)
    needed = needed_room(tokens, placed.slots_per_rank)
    small = Room(rows=needed.rows - (short == "rows"), entries=needed.entries - (short == "entries"))

    def body(rank: int, levels: list[Collectives]) -> tuple[list[Mixed], list[Room], int]:
        mine, products = tokens[rank], experts.of_rank(placed, rank)
        reported: list[Room] = []
        calls: list[None] = []

        def shared() -> Tensor:
            calls.append(None)
            return mine.x

        results = [
            run_plain(
                padded_or_exact(
                    levels[0],
                    mine.x,
                    mine.weights,
                    mine.experts,
                    placed=placed,
                    products=products,
                    room=room,
                    shared=shared,
                    overflowed=reported.append,
                )
            )
            for room in (small, needed)
        ]
        return results, reported, len(calls)

    found = LocalLevels((ranks,)).run(body)
    expected = on_one_rank(experts, tokens) + all_tokens(tokens).x
    for step in range(2):
        assert torch.equal(torch.cat([results[step].output_TH for results, _, _ in found]), expected)
    assert all(reported == [needed] for _, reported, _ in found), "the first did not fit, the second did"
    assert all(calls == 2 for _, _, calls in found), "shared experts are not computed again"
    load = torch.stack([results[0].load_E for results, _, _ in found]).sum(0)
    assert load.tolist() == torch.bincount(all_tokens(tokens).experts.flatten(), minlength=EXPERTS).tolist()


def test_the_exact_way_may_have_levels(seed: int) -> None:
    placed = even_map(EXPERTS, ranks=4)
    experts = make_experts(seed, EXPERTS)
    tokens = make_tokens(seed, TOKENS, EVEN, top_k=3, dtype=torch.float32)
    flat = local_group(4, name="flat")

    def body(rank: int, levels: list[Collectives]) -> Tensor:
        mine, products = tokens[rank], experts.of_rank(placed, rank)
        steps = padded_or_exact(
            flat[rank],
            mine.x,
            mine.weights,
            mine.experts,
            placed=placed,
            products=products,
            room=Room(rows=1, entries=1),
            levels=levels,
        )
        return run_plain(steps).output_TH

    groups = LocalLevels((2, 2))
    assert torch.equal(torch.cat(groups.run(body)), on_one_rank(experts, tokens))
    assert groups.sent(0).sum() > 0


def test_float8_rows(seed: int) -> None:
    placed = even_map(EXPERTS, ranks=2)
    experts = make_experts(seed, EXPERTS)
    tokens = make_tokens(seed, (4, 0), EVEN, top_k=2, dtype=torch.float8_e4m3fn)

    def body(rank: int, levels: list[Collectives]) -> Tensor:
        mine, plain = tokens[rank], experts.of_rank(placed, rank)
        products: Products = lambda rows, counts: plain(rows.float(), counts)  # noqa: E731
        steps = padded_or_exact(
            levels[0],
            mine.x,
            mine.weights,
            mine.experts,
            placed=placed,
            products=products,
            room=Room(rows=4, entries=8),
        )
        return run_plain(steps).output_TH

    as_floats = [Tokens(one.x.float(), one.weights, one.experts) for one in tokens]
    assert torch.equal(torch.cat(LocalLevels((2,)).run(body)), on_one_rank(experts, as_floats))


def test_different_maps_are_seen_by_all_ranks(seed: int) -> None:
    """Even where one rank has more slots than another."""
    held = torch.cat([torch.arange(EXPERTS), torch.full((8,), -1)])
    slots = torch.arange(EXPERTS).expand(2, EXPERTS)
    maps = [expert_map(held[: 2 * each].view(2, each), slots) for each in (5, 9)]
    tokens = make_tokens(seed, (4, 4), EVEN, top_k=2, dtype=torch.float32)

    def body(rank: int, levels: list[Collectives]) -> str:
        mine = tokens[rank]
        steps = padded_or_exact(
            levels[0],
            mine.x,
            mine.weights,
            mine.experts,
            placed=maps[rank],
            products=lambda rows, counts: rows,
            room=Room(rows=4, entries=8),
        )
        with pytest.raises(CommMisuse) as error:
            run_plain(steps)
        return str(error.value)

    for message in LocalLevels((2,)).run(body):
        assert "ranks use different maps of experts; switch maps on all ranks" in message


def test_no_room_is_refused() -> None:
    with pytest.raises(ValueError, match="room for rows must be at least 1, got 0"):
        Room(rows=0, entries=1)
    with pytest.raises(ValueError, match="room for entries must be at least 1, got -1"):
        Room(rows=1, entries=-1)


def test_results_must_be_as_many_as_places() -> None:
    (group,) = local_group(1)
    steps = mix_padded(
        group,
        torch.zeros((1, HIDDEN)),
        torch.ones((1, 1)),
        torch.zeros((1, 1), dtype=torch.int64),
        placed=even_map(EXPERTS, ranks=1),
        products=lambda rows, counts: rows[1:],
        room=Room(rows=2, entries=3),
    )
    with pytest.raises(CommMisuse, match="the experts made 2 rows of 3"):
        run_plain(steps)


class NothingReadBack(TorchFunctionMode):
    """Fails where the host would wait for a GPU to know a value, or a shape that depends on one."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in {"item", "tolist", "numpy", "__bool__", "__int__", "__index__", "__float__"}, name
        return func(*args, **(kwargs or {}))


class FixedShapes(TorchDispatchMode):
    """As ``NothingReadBack``, for what operations do inside; keeps the shapes of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = str(func).split(".")[1]
        assert name not in {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique_dim"}, name
        assert not name.startswith(("_unique", "unique")), name
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.shapes.append((name, tuple(result.shape)))
        return result


def all_products(experts: Experts) -> Products:
    """Return products that multiply every row with every expert and keep what was asked for: no count is read."""

    def products(rows: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0)
        slots = torch.searchsorted(ends, torch.arange(len(rows), device=rows.device), right=True)
        hidden = silu_and_mul(rows @ experts.gate_up.transpose(1, 2))
        by_expert = hidden @ experts.down.transpose(1, 2)
        kept = slots == torch.arange(len(counts), device=rows.device)[:, None]
        return (by_expert * kept[:, :, None]).sum(0)

    return products


def test_nothing_is_read_back_and_shapes_are_those_of_the_room(seed: int) -> None:
    experts = make_experts(seed, EXPERTS, company=False)
    placed = even_map(EXPERTS, ranks=1)
    shapes = []
    for likely in (EVEN, torch.tensor([1.0] * 3 + [0.0] * 7)):
        (mine,) = make_tokens(seed, (6,), likely, top_k=3, dtype=torch.float32)
        (group,) = local_group(1)
        steps = mix_padded(
            group,
            mine.x,
            mine.weights,
            mine.experts,
            placed=placed,
            products=all_products(experts),
            room=Room(rows=6, entries=18),
        )
        with NothingReadBack(), FixedShapes() as watched:
            padded = run_plain(steps)
        shapes.append(watched.shapes)
        assert fits(padded, group)[0]
        assert torch.allclose(padded.routed_TH, on_one_rank(experts, [mine]), atol=1e-5)
    assert len(shapes[0]) > 20
    assert shapes[0] == shapes[1]


@pytest.mark.gpu
def test_a_gpu_records_it_once_and_repeats_it_for_other_tokens(seed: int) -> None:
    device = torch.device("cuda")
    on_cpu = make_experts(seed, EXPERTS, company=False)
    experts = Experts(on_cpu.gate_up.to(device), on_cpu.down.to(device), False)
    placed = even_map(EXPERTS, ranks=1, device=device)
    (group,) = local_group(1)
    batches = [make_tokens(seed + step, (6,), EVEN, top_k=3, dtype=torch.float32)[0] for step in range(3)]
    static = Tokens(*(getattr(batches[0], name).to(device) for name in ("x", "weights", "experts")))

    def step() -> PaddedMix:
        return run_plain(
            mix_padded(
                group,
                static.x,
                static.weights,
                static.experts,
                placed=placed,
                products=all_products(experts),
                room=Room(rows=6, entries=18),
            )
        )

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        padded = step()
    for batch in batches:
        for name in ("x", "weights", "experts"):
            getattr(static, name).copy_(getattr(batch, name))
        graph.replay()
        assert fits(padded, group) == (True, Room(rows=6, entries=18))
        assert torch.allclose(padded.routed_TH.cpu(), on_one_rank(on_cpu, [batch]), atol=1e-4)
