"""The contract of ``Collectives``, as tests: an implementation's test module subclasses this and says how ranks run.

A scenario is a function that every rank runs, perhaps in a process of its own, so it takes what JSON can carry and is
found by its name. All ranks draw from one seed: each knows what the others bring, and so what must come out.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slipstream.comm.collectives import Collectives, Work
from slipstream.comm.errors import CommError, CommMisuse, CommTimeout, GroupClosed, PeerLost
from slipstream.comm.rank_order import reduce_in_rank_order

SIZES = (1, 2, 3, 4)

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
ONLY_MOVED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.bool)

LENGTHS = (0, 1, 7, 1000, 40_000, 600_001)
"""Of what is reduced: nothing, fewer than ranks, one hop, two, several segments; and what does not divide."""

Scenario = Callable[[Collectives, int], object]


def draw(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return a tensor of bits that nothing rounds, whatever the type; of numbers where they are added."""
    generator = torch.Generator().manual_seed(seed)
    if dtype in FLOATS:
        return torch.randn(shape, generator=generator).to(dtype)
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    if dtype in WHOLE:
        return torch.randint(-100 if dtype.is_signed else 0, 100, shape, generator=generator).to(dtype)
    return torch.randint(256, shape, generator=generator).to(torch.uint8).view(dtype)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have one type, one shape and the same bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return one.contiguous().view(-1).view(torch.uint8).equal(other.contiguous().view(-1).view(torch.uint8))


def of_ranks(group: Collectives, dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> list[Tensor]:
    """Return what each rank brings."""
    return [draw(dtype, shape, seed * 64 + rank) for rank in range(group.size)]


def count_matrix(size: int, draws: random.Random) -> list[list[int]]:
    """Return how many rows every rank sends to every rank: sender, receiver."""
    kind = draws.choice(["uneven", "sparse", "to one", "from one", "nothing"])
    only = draws.randrange(size)
    return [
        [
            0
            if kind == "nothing"
            or (kind == "sparse" and draws.random() < 0.7)
            or (kind == "to one" and to != only)
            or (kind == "from one" and source != only)
            else draws.randrange(9)
            for to in range(size)
        ]
        for source in range(size)
    ]


# --- scenarios: what every rank does


def reduce_everything(group: Collectives, seed: int) -> None:
    """All types and lengths, both ops: the ranks' tensors added in their order, to the bit."""
    for dtype in (*FLOATS, *WHOLE):
        # The longest takes the time, so not with every type.
        for length in LENGTHS if dtype in (torch.float32, torch.bfloat16) else LENGTHS[:-1]:
            for op in ("sum", "max"):
                brought = of_ranks(group, dtype, (length,), seed + length)
                x = brought[group.rank].clone()
                result = group.all_reduce(x, op=op).wait()
                assert result is x
                wanted = reduce_in_rank_order(brought, op, torch.empty_like(x))
                assert same_bits(x, wanted), (dtype, length, op)


def rows_do_not_matter_to_one_another(group: Collectives, seed: int) -> None:
    """A row adds up to the same bits alone, and anywhere among others."""
    rows = of_ranks(group, torch.float32, (67, 600), seed)[group.rank]
    together = group.all_reduce(rows.clone()).wait()
    for place in (0, 1, 33, 66):
        assert same_bits(group.all_reduce(rows[place].clone()).wait(), together[place])
    moved = group.all_reduce(rows.roll(5, 0).contiguous()).wait()
    assert same_bits(moved.roll(-5, 0), together)


def scatter_and_gather(group: Collectives, seed: int) -> None:
    """Reduce-scatter keeps this rank's rows of the sum; all-gather puts them back; both leave what they were given."""
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        for rows in (0, 1, 5, 64):
            brought = of_ranks(group, dtype, (rows * group.size, 3, 2), seed + rows)
            mine = brought[group.rank].clone()
            part = group.reduce_scatter(mine).wait()
            total = reduce_in_rank_order(brought, "sum", torch.empty_like(mine))
            assert same_bits(part, total[group.rank * rows : (group.rank + 1) * rows]), (dtype, rows)
            assert same_bits(mine, brought[group.rank])
            assert same_bits(group.all_gather(part).wait(), total)


def inference_mode_is_the_callers(group: Collectives, seed: int) -> None:
    """Tensors made under inference mode may only be written to under it, whichever thread of the group does so."""
    for length in (5, 300_000):
        with torch.inference_mode():
            brought = of_ranks(group, torch.float32, (length * group.size,), seed + length)
            total = reduce_in_rank_order(brought, "sum", torch.empty_like(brought[0]))
            assert same_bits(group.all_reduce(brought[group.rank].clone()).wait(), total)
            part = group.reduce_scatter(brought[group.rank].clone()).wait()
            assert same_bits(group.all_gather(part).wait(), total)
        outside = group.all_reduce(torch.ones(length)).wait()
        outside += 1


def move_everything(group: Collectives, seed: int) -> None:
    """Any type travels, bit for bit, by every operation that moves."""
    for dtype in (*FLOATS, *WHOLE, *ONLY_MOVED):
        brought = of_ranks(group, dtype, (6, 5), seed)
        mine = brought[group.rank].clone()
        assert same_bits(group.all_gather(mine).wait(), torch.cat([x.view(torch.uint8) for x in brought]).view(dtype))
        for root in range(group.size):
            x = mine.clone()
            assert group.broadcast(x, root=root).wait() is x
            assert same_bits(x, brought[root]), (dtype, root)
        right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        if group.size > 1:
            out = torch.empty_like(mine)
            sending = group.send(mine, to=right)
            assert group.receive(out, source=left).wait() is out
            assert sending.wait() is mine
            assert same_bits(out, brought[left]), dtype
        counts = [(group.rank + to) % 4 for to in range(group.size)]
        rows = draw(dtype, (sum(counts), 3), seed)
        got = group.all_to_all(rows, send_counts=counts, receive_counts=counts).wait()
        assert same_bits(group.all_to_all(got, send_counts=counts, receive_counts=counts).wait(), rows), dtype


def spread_rows_unevenly(group: Collectives, seed: int) -> None:
    """Every row reaches the rank it was sent to, in the order of senders, whoever sends how many."""
    draws = random.Random(seed)
    for _ in range(20):
        counts = count_matrix(group.size, draws)
        # A row says who sent it, to whom, and which one it is.
        sent = [
            torch.tensor([[source, to, row] for to in range(group.size) for row in range(counts[source][to])])
            for source in range(group.size)
        ]
        received = group.all_to_all(
            sent[group.rank].reshape(-1, 3).long(),
            send_counts=counts[group.rank],
            receive_counts=[counts[source][group.rank] for source in range(group.size)],
        ).wait()
        wanted = [
            [source, group.rank, row] for source in range(group.size) for row in range(counts[source][group.rank])
        ]
        assert received.tolist() == wanted


def many_in_flight(group: Collectives, seed: int) -> None:
    """Works are waited for in any order, another on each rank, and a wait may be repeated."""
    lengths = [3 + 1000 * place for place in range(24)]
    brought = [of_ranks(group, torch.float32, (length,), seed + length) for length in lengths]
    works = [group.all_reduce(parts[group.rank].clone()) for parts in brought]
    order = list(range(len(works)))
    random.Random(seed + group.rank).shuffle(order)
    for place in order:
        wanted = reduce_in_rank_order(brought[place], "sum", torch.empty(lengths[place]))
        assert same_bits(works[place].wait(), wanted)
        assert works[place].done()
        assert works[place].wait() is works[place].wait()


def pairs_keep_their_order(group: Collectives, seed: int) -> None:
    """Between two ranks tensors arrive as they were sent, both ways at once, beside collectives."""
    others = [rank for rank in range(group.size) if rank != group.rank]
    sends = [group.send(torch.tensor([group.rank, to, number]), to=to) for number in range(10) for to in others]
    total = group.all_reduce(torch.ones(50_000))
    outs = {source: [torch.empty(3, dtype=torch.long) for _ in range(10)] for source in others}
    receives = {source: [group.receive(out, source=source) for out in outs[source]] for source in others}
    for source in reversed(others):
        for number in reversed(range(10)):
            assert receives[source][number].wait().tolist() == [source, group.rank, number]
    for work in sends:
        work.wait()
    assert total.wait().eq(group.size).all()


def done_comes_true_without_waiting(group: Collectives, seed: int) -> None:
    """A rank that only asks is told: the barrier is passed when all have been."""
    works = [group.all_reduce(torch.ones(length)) for length in (10, 100_000)]
    works.append(group.all_gather(torch.ones(4)))
    while not all(work.done() for work in works):
        pass
    assert works[0].wait().eq(group.size).all() and works[1].wait().eq(group.size).all()
    group.barrier()


def misuse_is_named_and_harmless(group: Collectives, seed: int) -> None:
    """What one rank alone can see to be wrong is refused before anything is sent; the group lives on."""
    n, ones = group.size, [1] * group.size
    wrong: list[tuple[str, Callable[[], Work]]] = [
        ("must be contiguous", lambda: group.all_reduce(torch.ones(4, 4).t())),
        ("op must be one of sum, max", lambda: group.all_reduce(torch.ones(4), op="mean")),
        ("only moved", lambda: group.all_reduce(torch.ones(4).to(torch.float8_e4m3fn))),
        ("first axis", lambda: group.all_gather(torch.tensor(1.0))),
        ("send_counts add up", lambda: group.all_to_all(torch.ones(n + 1), send_counts=ones, receive_counts=ones)),
        ("entries for", lambda: group.all_to_all(torch.ones(n + 1), send_counts=[*ones, 1], receive_counts=ones)),
        ("not be negative", lambda: group.all_to_all(torch.ones(0), send_counts=[-1] * n, receive_counts=[0] * n)),
        ("sends itself", lambda: group.all_to_all(torch.ones(n), send_counts=ones, receive_counts=[0] * n)),
        ("not in the group", lambda: group.broadcast(torch.ones(1), root=n)),
        ("not in the group", lambda: group.send(torch.ones(1), to=-1)),
        ("this rank itself", lambda: group.receive(torch.ones(1), source=group.rank)),
    ]  # fmt: skip
    if n > 1:
        wrong.append(("do not divide", lambda: group.reduce_scatter(torch.ones(n + 1))))
    for message, call in wrong:
        with pytest.raises(CommMisuse, match=message) as refused:
            call()
        assert f"group {group.name}: " in str(refused.value) and f"at rank {group.rank} of {n}" in str(refused.value)
    assert group.all_reduce(torch.ones(1)).wait().item() == n


def anything_in_any_order(group: Collectives, seed: int) -> None:
    """A random program: operations of random kinds, types and shapes, some in flight at a time."""
    draws = random.Random(seed)
    flying: list[tuple[Work, Tensor]] = []
    for step in range(60):
        dtype = draws.choice((*FLOATS, *WHOLE))
        shape = (draws.randrange(4) * group.size, *(draws.randrange(1, 40) for _ in range(draws.randrange(3))))
        brought = of_ranks(group, dtype, shape, draws.randrange(2**40))
        mine = brought[group.rank].clone()
        total = reduce_in_rank_order(brought, "sum", torch.empty_like(mine))
        rows = shape[0] // group.size
        match draws.randrange(5):
            case 0:
                flying.append((group.all_reduce(mine), total))
            case 1:
                flying.append((group.reduce_scatter(mine), total[group.rank * rows : (group.rank + 1) * rows]))
            case 2:
                flying.append((group.all_gather(mine), torch.cat(brought)))
            case 3:
                root = draws.randrange(group.size)
                flying.append((group.broadcast(mine, root=root), brought[root]))
            case 4:
                counts = [rows] * group.size
                wanted = torch.cat([x[group.rank * rows : (group.rank + 1) * rows] for x in brought])
                flying.append((group.all_to_all(mine, send_counts=counts, receive_counts=counts), wanted))
        while len(flying) > draws.randrange(6):
            work, wanted = flying.pop(draws.randrange(len(flying)))
            assert same_bits(work.wait(), wanted), step
    for work, wanted in flying:
        assert same_bits(work.wait(), wanted)


def last_rank_stays_away(group: Collectives, seed: int) -> str | None:
    """The others name it within the deadline, and their group is dead."""
    if group.rank == group.size - 1:
        return None
    work: Work | None = None
    with pytest.raises(CommError) as first:
        work = group.all_reduce(torch.ones(4))
        work.wait(0.2)
    assert_dead(group, work)
    return type(first.value).__name__


def last_rank_closes(group: Collectives, seed: int) -> str | None:
    """What was in flight with it ends at once on the others, long before the deadline."""
    if group.rank == group.size - 1:
        group.barrier()
        group.close()
        group.close()
        with pytest.raises(GroupClosed, match=f"rank {group.rank} closed the group"):
            group.all_reduce(torch.ones(1))
        return None
    group.barrier()
    with pytest.raises((GroupClosed, PeerLost)) as first:
        group.all_reduce(torch.ones(100_000)).wait()
    assert_dead(group, None)
    return type(first.value).__name__


def assert_dead(group: Collectives, work: Work | None) -> None:
    """Every later call raises at once, and says where."""
    calls: list[Callable[[], object]] = [
        lambda: group.all_reduce(torch.ones(1)),
        lambda: group.send(torch.ones(1), to=(group.rank + 1) % group.size),
        group.barrier,
    ]
    if work is not None:
        assert work.done()
        calls.append(work.wait)
    for call in calls:
        with pytest.raises((GroupClosed, PeerLost, CommTimeout), match=f"at rank {group.rank} of {group.size}"):
            call()


EVERYWHERE: tuple[Scenario, ...] = (
    reduce_everything,
    rows_do_not_matter_to_one_another,
    scatter_and_gather,
    move_everything,
    spread_rows_unevenly,
    many_in_flight,
    inference_mode_is_the_callers,
    pairs_keep_their_order,
    done_comes_true_without_waiting,
    misuse_is_named_and_harmless,
    anything_in_any_order,
)


class CollectivesContract(ABC):
    """Subclass with a name that pytest collects, and say how ranks run."""

    @abstractmethod
    def run(self, size: int, scenario: Scenario, seed: int, *, timeout_s: float = 30.0) -> list[object]:
        """Run a scenario on every rank of a new group; return the results by rank, or raise what a rank raised."""

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("scenario", EVERYWHERE, ids=lambda scenario: scenario.__name__)
    def test_contract(self, size: int, scenario: Scenario, seed: int) -> None:
        self.run(size, scenario, seed % 2**32)

    @pytest.mark.parametrize("size", SIZES[1:])
    def test_missing_rank(self, size: int, seed: int) -> None:
        *seen, absent = self.run(size, last_rank_stays_away, seed)
        assert absent is None
        assert "CommTimeout" in seen and set(seen) <= {"CommTimeout", "PeerLost"}

    @pytest.mark.parametrize("size", SIZES[1:])
    def test_closing_rank(self, size: int, seed: int) -> None:
        *seen, closer = self.run(size, last_rank_closes, seed)
        assert closer is None and len(seen) == size - 1
