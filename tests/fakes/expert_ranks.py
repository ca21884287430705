"""Ranks of a mixture of experts as threads, with experts whose results tell in which company a row was computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from slipstream.comm.collectives import Collectives
from slipstream.comm.expert_map import ExpertMap, expert_map
from slipstream.comm.experts import Products
from slipstream.comm.local_groups import local_group, run_ranks
from slipstream.kernels.moe_mlp import Product, expert_products, moe_mlp

HIDDEN, INNER = 16, 32

_Result = TypeVar("_Result")


class LocalLevels:
    """The groups of every level, and what passed between ranks on each of them."""

    def __init__(self, sizes: Sequence[int], timeout_s: float = 20.0) -> None:
        self.ranks = prod(sizes)
        self.of_rank: list[list[Collectives]] = [[] for _ in range(self.ranks)]
        self._sent: list[list[tuple[list[int], Counter[tuple[int, int]]]]] = []
        self._timeout_s = timeout_s
        behind = self.ranks
        for size in sizes:
            behind //= size
            self._sent.append([self._join(size, behind, first) for first in self._firsts(size, behind)])

    def run(self, body: Callable[[int, list[Collectives]], _Result]) -> list[_Result]:
        """Run ``body(rank, levels)`` on all ranks; return the results by rank. A rank that fails ends all groups."""

        def run_rank(me: Collectives) -> _Result:
            try:
                return body(me.rank, self.of_rank[me.rank])
            except BaseException:
                for group in self.of_rank[me.rank]:
                    group.close()
                raise

        return run_ranks(local_group(self.ranks, name="all", timeout_s=self._timeout_s), run_rank)

    def sent(self, level: int) -> Tensor:
        """Return the bytes that passed on a level: [ranks, ranks], sender first."""
        total = torch.zeros((self.ranks, self.ranks), dtype=torch.int64)
        for members, counter in self._sent[level]:
            for (source, to), count in counter.items():
                total[members[source], members[to]] += count
        return total

    def _firsts(self, size: int, behind: int) -> list[int]:
        return [rank for rank in range(self.ranks) if rank // behind % size == 0]

    def _join(self, size: int, behind: int, first: int) -> tuple[list[int], Counter[tuple[int, int]]]:
        members = [first + place * behind for place in range(size)]
        counter: Counter[tuple[int, int]] = Counter()
        name = "-".join(map(str, members))
        group = local_group(size, name=name, timeout_s=self._timeout_s, bytes_sent=counter)
        for member, seen in zip(members, group, strict=True):
            self.of_rank[member].append(seen)
        return members, counter


@dataclass(frozen=True, slots=True)
class Experts:
    """The weights of all experts. With ``company``, a row's result depends on its place among an expert's rows."""

    gate_up: Tensor
    down: Tensor
    company: bool

    def gate_up_of(self, expert: int) -> Product:
        """Return the product with an expert's gate and up."""
        return partial(_multiply, self.gate_up[expert], self.company)

    def down_of(self, expert: int) -> Product:
        """Return the product with an expert's down."""
        return partial(_multiply, self.down[expert], self.company)

    def of_rank(self, placed: ExpertMap, rank: int) -> Products:
        """Return the products of a rank's slots."""
        here = placed.experts_NS[rank].tolist()
        return partial(
            expert_products,
            gate_up=[_nobody if expert < 0 else self.gate_up_of(expert) for expert in here],
            down=[_nobody if expert < 0 else self.down_of(expert) for expert in here],
        )

    def on_one_rank(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Return what all the tokens make on one rank."""
        all_experts = range(len(self.gate_up))
        gate_up, down = map(self.gate_up_of, all_experts), map(self.down_of, all_experts)
        return moe_mlp(x, weights, experts, list(gate_up), list(down))


def make_experts(seed: int, count: int, *, dtype: torch.dtype = torch.float32, company: bool = True) -> Experts:
    """Return ``count`` experts with random weights."""
    draw = torch.Generator().manual_seed(seed)
    return Experts(
        (torch.randn((count, 2 * INNER, HIDDEN), generator=draw) / 4).to(dtype),
        (torch.randn((count, HIDDEN, INNER), generator=draw) / 4).to(dtype),
        company,
    )


def _nobody(x: Tensor, bias: Tensor | None) -> Tensor:
    raise AssertionError(f"{len(x)} rows came to an empty slot")


def _multiply(weight: Tensor, company: bool, x: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply row by row: the same bits whatever stands beside a row; or else all the more different ones."""
    assert bias is None
    assert len(x), "an expert without rows is not asked"
    rows = torch.cat([torch.nn.functional.linear(row[None], weight) for row in x])
    if not company:
        return rows
    return rows * (1 + torch.arange(len(x), dtype=x.dtype)[:, None] / 32) + len(x) / 64


@dataclass(frozen=True, slots=True)
class Tokens:
    """One rank's tokens and their experts."""

    x: Tensor
    weights: Tensor
    experts: Tensor


def make_tokens(seed: int, counts: Sequence[int], choose: Tensor, *, top_k: int, dtype: torch.dtype) -> list[Tokens]:
    """Return each rank's tokens; a token's experts are drawn with the probabilities ``choose``, each at most once."""
    draw = torch.Generator().manual_seed(seed)
    tokens = []
    for count in counts:
        experts = torch.empty((count, top_k), dtype=torch.int64)
        for token in range(count):
            experts[token] = torch.multinomial(choose, top_k, generator=draw)
        weights = torch.rand((count, top_k), generator=draw)
        tokens.append(Tokens(torch.randn((count, HIDDEN), generator=draw).to(dtype), weights, experts))
    return tokens


def all_tokens(tokens: Sequence[Tokens]) -> Tokens:
    """Return the tokens of all ranks, one after the other."""
    return Tokens(
        torch.cat([one.x for one in tokens]),
        torch.cat([one.weights for one in tokens]),
        torch.cat([one.experts for one in tokens]),
    )


def replicated(seed: int, count: int, ranks: int) -> ExpertMap:
    """Return a map with random slots: ``ranks`` replicas of expert 0, two of expert 1, one of every other.

    Each rank's tokens use any of the replicas.
    """
    slots_per_rank = -(-2 * count // ranks)
    draw = torch.Generator().manual_seed(seed)
    experts = torch.full((ranks * slots_per_rank,), -1)
    held = torch.tensor([*range(count), *[0] * (ranks - 1), 1])
    experts[torch.randperm(len(experts), generator=draw)[: len(held)]] = held
    replicas = [(experts == expert).nonzero().flatten() for expert in range(count)]
    slots = [[int(own[torch.randint(len(own), (), generator=draw)]) for own in replicas] for _ in range(ranks)]
    return expert_map(experts.view(ranks, slots_per_rank), torch.tensor(slots))
