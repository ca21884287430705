"""Paged attention against a plain softmax in float64, over random rows, tables, windows and shapes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from slipstream.kernels.attention import paged_attention, prepare_attention
from slipstream.kernels.attention_plan import build_attention_plan
from slipstream.kernels.cpu import attention_decode, attention_prefill
from slipstream.kernels.cpu.attention_workspace import AttentionWorkspace
from slipstream.tests.kernels.native_ways import compiled_or_skip, torch_alone
from slipstream.tests.kernels.rounding import worst_error

CPU = torch.device("cpu")
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 3e-3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Rows of (start, count) over a cache that holds no number outside of the rows' own positions."""

    rows: tuple[tuple[int, int], ...]
    queries: torch.Tensor
    cache: torch.Tensor
    tables: np.ndarray
    block_size: int
    kv_heads: int
    soft_cap: float | None = None
    sinks: torch.Tensor | None = None

    def run(self, window: int | None, *, only: int | None = None, deterministic: bool = False) -> torch.Tensor:
        """Attend all rows, or row ``only`` by itself."""
        chosen = range(len(self.rows)) if only is None else [only]
        starts, counts = np.array([self.rows[row] for row in chosen], dtype=np.int32).T
        plan = build_attention_plan(
            starts=starts,
            counts=counts,
            block_tables=self.tables[list(chosen)],
            block_size=self.block_size,
            heads=self.queries.shape[1],
            kv_heads=self.kv_heads,
            head_size=self.queries.shape[-1],
            window=window,
            dtype=self.cache.dtype,
            device=CPU,
            deterministic=deterministic,
        )
        queries = torch.cat([self.row_of(self.queries, row) for row in chosen])
        workspace = AttentionWorkspace(dtype=self.cache.dtype, device=CPU)
        tokens, heads, head_size = queries.shape
        prepared = prepare_attention(plan, self.cache, tokens=tokens, heads=heads, workspace=workspace)
        return paged_attention(
            queries, self.cache, prepared, scale=head_size**-0.5, soft_cap=self.soft_cap, sinks_N=self.sinks
        )

    def row_of(self, values: torch.Tensor, row: int) -> torch.Tensor:
        """Return the part of per-token values that belongs to a row."""
        first = sum(count for _, count in self.rows[:row])
        return values[first : first + self.rows[row][1]]

    def expected(self, row: int, window: int | None) -> np.ndarray:
        """Return a row's attention in float64."""
        start, count = self.rows[row]
        positions = np.arange(start + count)
        blocks = self.tables[row][positions // self.block_size]
        stored = self.cache[:, blocks, :, positions % self.block_size].double().numpy()
        queries = self.row_of(self.queries, row).double().numpy()
        group = queries.shape[1] // self.kv_heads
        keys, values = (np.repeat(stored[:, part], group, axis=1) for part in (0, 1))
        scores = np.einsum("tnd,jnd->ntj", queries, keys) / np.sqrt(queries.shape[-1])
        if self.soft_cap is not None:
            scores = self.soft_cap * np.tanh(scores / self.soft_cap)
        distance = (start + np.arange(count))[:, None] - positions[None, :]
        seen = (distance >= 0) & (distance < (window or 1 << 30))
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        totals = weights.sum(-1, keepdims=True)
        if self.sinks is not None:
            totals += np.exp(self.sinks.double().numpy()[:, None, None] - scores.max(-1, keepdims=True))
        return np.einsum("ntj,jnd->tnd", weights / totals, values)


def make_problem(
    seed: int,
    rows: tuple[tuple[int, int], ...],
    *,
    heads: tuple[int, int] = (4, 2),
    head_size: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Problem:
    random = np.random.default_rng(seed)
    blocks_each = -(-max(start + count for start, count in rows) // block_size)
    num_blocks = len(rows) * blocks_each + 2
    tables = random.permutation(num_blocks)[: len(rows) * blocks_each].reshape(len(rows), -1).astype(np.int32)
    cache = torch.full((2, num_blocks, heads[1], block_size, head_size), float("nan"), dtype=dtype)
    for table, (start, count) in zip(tables, rows, strict=True):
        used = table[: -(-(start + count) // block_size)]
        shape = (2, len(used), heads[1], block_size, head_size)
        cache[:, used] = torch.from_numpy(random.standard_normal(shape)).to(dtype)
    tokens = sum(count for _, count in rows)
    # Queries as a slice of wider rows, as they come from the fused product.
    wide = torch.from_numpy(random.standard_normal((tokens, heads[0] + 3, head_size))).to(dtype)
    return Problem(
        rows=rows,
        queries=wide[:, : heads[0]],
        cache=cache,
        tables=tables,
        block_size=block_size,
        kv_heads=heads[1],
    )


def check(problem: Problem, window: int | None, *, deterministic: bool = False, slack: float = 1.0) -> None:
    found = problem.run(window, deterministic=deterministic)
    for row in range(len(problem.rows)):
        error = worst_error(problem.row_of(found, row), problem.expected(row, window))
        assert error <= slack * BOUNDS[problem.cache.dtype], f"row {problem.rows[row]}, window {window}: {error:.2e}"


def by_way(way: str) -> AbstractContextManager[None]:
    """Return what to run a test in: torch's operations alone, or the compiled kernels, which must be there then."""
    if way == "torch":
        return torch_alone()
    compiled_or_skip()
    return nullcontext()


DECODE_ROWS = tuple((position, 1) for position in (0, 1, 15, 16, 127, 128, 129, 300, 511))
PREFILL_ROWS = ((0, 2), (0, 128), (0, 129), (5, 7), (63, 65), (64, 64), (100, 300), (37, 256))
MIXED_ROWS = ((0, 1), (0, 30), (200, 1), (17, 130), (63, 1), (64, 1), (130, 2))


@pytest.mark.parametrize(("way", "deterministic"), [("compiled", False), ("torch", False), ("torch", True)])
@pytest.mark.parametrize("window", [None, 1, 2, 16, 50, 128, 200])
@pytest.mark.parametrize("rows", [DECODE_ROWS, PREFILL_ROWS, MIXED_ROWS], ids=["decode", "prefill", "mixed"])
@pytest.mark.parametrize("block_size", [1, 5, 8, 16, 32, 256])
def test_windows_and_block_sizes(
    seed: int, rows: tuple[tuple[int, int], ...], window: int | None, block_size: int, way: str, deterministic: bool
) -> None:
    with by_way(way):
        check(make_problem(seed, rows, block_size=block_size), window, deterministic=deterministic)


@pytest.mark.parametrize("way", ["compiled", "torch"])
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("head_size", [6, 24, 64])
def test_heads_and_types(seed: int, heads: tuple[int, int], head_size: int, dtype: torch.dtype, way: str) -> None:
    with by_way(way):
        check(make_problem(seed, MIXED_ROWS, heads=heads, head_size=head_size, dtype=dtype), 90)


@pytest.mark.parametrize(("way", "deterministic"), [("compiled", False), ("torch", False), ("torch", True)])
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("window", [None, 90])
def test_caps_and_sinks(seed: int, window: int | None, dtype: torch.dtype, way: str, deterministic: bool) -> None:
    rows = (*MIXED_ROWS, (511, 1), (100, 300), (270, 30))
    problem = make_problem(seed, rows, heads=(6, 2), dtype=dtype)
    sinks = 2 * torch.randn(6, generator=torch.Generator().manual_seed(seed))
    with by_way(way):
        for soft_cap, own_sinks in ((None, sinks), (1.2, sinks), (30.0, sinks), (1.2, None)):
            changed = replace(problem, soft_cap=soft_cap, sinks=own_sinks)
            # What is capped is rounded once more.
            check(changed, window, deterministic=deterministic, slack=2.0)


@pytest.mark.parametrize("window", [None, 70])
def test_little_memory_at_a_time_gives_the_same(seed: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(seed, (*MIXED_ROWS, *DECODE_ROWS), heads=(6, 3))
    with torch_alone():
        expected = problem.run(window)
        monkeypatch.setattr(attention_decode, "GATHER_BYTES", 1)
        monkeypatch.setattr(attention_prefill, "GATHER_BYTES", 1)
        assert torch.equal(problem.run(window), expected)


@pytest.mark.parametrize("way", ["compiled", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_size", [16, 64])
def test_a_row_gives_the_same_bits_alone_and_in_company(
    seed: int, head_size: int, dtype: torch.dtype, way: str
) -> None:
    problem = make_problem(seed, (*MIXED_ROWS, *DECODE_ROWS), head_size=head_size, dtype=dtype)
    with by_way(way):
        together = problem.run(None)
        for row in range(len(problem.rows)):
            assert torch.equal(problem.run(None, only=row), problem.row_of(together, row)), problem.rows[row]


@pytest.mark.parametrize("way", ["compiled", "torch"])
def test_random_batches(seed: int, way: str) -> None:
    with by_way(way):
        check_random_batches(seed)


def check_random_batches(seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(25):
        counts = np.where(random.random(6) < 0.5, 1, random.integers(1, 200, 6))
        rows = tuple((int(start), int(count)) for start, count in zip(random.integers(0, 300, 6), counts, strict=True))
        window = None if random.random() < 0.3 else int(random.integers(1, 250))
        check(make_problem(int(random.integers(1 << 30)), rows, block_size=int(random.integers(1, 40))), window)
