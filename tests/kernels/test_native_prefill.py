"""Compiled prefill attention against float64; it reads nothing that its rows do not see, writes nothing but their
results, and a position has the bits that decoding gives it, however its sequence is cut.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slipstream.kernels.attention import paged_attention, prepare_attention
from slipstream.kernels.attention_plan import AttentionPlan, build_attention_plan
from slipstream.kernels.attention_span import AttentionOptions
from slipstream.kernels.cpu.attention_paged import PagedRows
from slipstream.kernels.cpu.attention_paged_prefill import PagedRuns, attend_paged_runs, prepare_paged_runs
from slipstream.kernels.cpu.attention_workspace import AttentionWorkspace
from slipstream.tests.kernels.native_ways import compiled_or_skip, compiled_without
from slipstream.tests.kernels.rounding import worst_error

pytestmark = pytest.mark.usefixtures("compiled")

CPU = torch.device("cpu")
BOUNDS = {torch.float32: 1.5e-5, torch.bfloat16: 2e-2}
SCALE = 0.2
Row = tuple[int, int]
ROWS: tuple[Row, ...] = ((0, 2), (0, 33), (5, 7), (254, 3), (255, 2), (250, 40), (63, 65), (500, 30), (3, 300))


class Runs:
    """Rows of (start, count); the cache holds no number where they have none, and queries of float32 or bfloat16."""

    def __init__(
        self,
        seed: int,
        rows: tuple[Row, ...] = ROWS,
        *,
        dtype: torch.dtype,
        heads: tuple[int, int] = (6, 2),
        head_size: int = 64,
        block_size: int = 16,
    ) -> None:
        draw = np.random.default_rng(seed)
        self.rows, self.block_size, self.kv_heads = rows, block_size, heads[1]
        lengths = [start + count for start, count in rows]
        blocks = [-(-length // block_size) for length in lengths]
        order = draw.permutation(sum(blocks)).astype(np.int32)
        self.tables = np.full((len(rows), max(blocks) + 1), 2**31 - 1, np.int32)  # what must not be read is no block
        self.cache = torch.full((2, sum(blocks), heads[1], block_size, head_size), math.nan, dtype=dtype)
        for row, length in enumerate(lengths):
            own, order = order[: blocks[row]], order[blocks[row] :]
            self.tables[row, : len(own)] = own
            positions = np.arange(length)
            numbers = torch.from_numpy(draw.standard_normal((length, 2, heads[1], head_size))).to(dtype)
            self.cache[:, own[positions // block_size], :, positions % block_size] = numbers
        firsts = np.cumsum([0, *(count for _, count in rows)])
        self.tokens = [slice(int(first), int(end)) for first, end in pairwise(firsts)]
        wide = torch.from_numpy(draw.standard_normal((int(firsts[-1]), heads[0] + 2, head_size))).to(dtype)
        self.queries = wide[:, : heads[0]]
        self.soft_cap: float | None = None
        self.sinks: torch.Tensor | None = None

    def plan(self, pieces: list[tuple[int, int, int]], window: int | None) -> AttentionPlan:
        """Plan pieces (row, first position, end)."""
        return build_attention_plan(
            starts=np.array([first for _, first, _ in pieces], np.int32),
            counts=np.array([end - first for _, first, end in pieces], np.int32),
            block_tables=self.tables[[row for row, _, _ in pieces]],
            block_size=self.block_size,
            heads=self.queries.shape[1],
            kv_heads=self.kv_heads,
            head_size=self.queries.shape[-1],
            window=window,
            dtype=self.cache.dtype,
            device=CPU,
        )

    def whole(self) -> list[tuple[int, int, int]]:
        return [(row, start, start + count) for row, (start, count) in enumerate(self.rows)]

    def attend(self, pieces: list[tuple[int, int, int]], window: int | None) -> list[torch.Tensor]:
        plan = self.plan(pieces, window)
        for _, first, end in pieces:
            assert isinstance(plan.decode, PagedRows) if end == first + 1 else isinstance(plan.prefill, PagedRuns)
        parts = [
            self.queries[self.tokens[row]][first - self.rows[row][0] : end - self.rows[row][0]]
            for row, first, end in pieces
        ]
        # All rows as they are: a slice of wider ones, as they come from the fused product.
        queries = self.queries if pieces == self.whole() else torch.cat(parts)
        workspace = AttentionWorkspace(dtype=self.cache.dtype, device=CPU)
        prepared = prepare_attention(plan, self.cache, tokens=len(queries), heads=queries.shape[1], workspace=workspace)
        options: dict[str, Any] = {"scale": SCALE, "soft_cap": self.soft_cap, "sinks_N": self.sinks}
        found = paged_attention(queries, self.cache, prepared, **options)
        again = paged_attention(queries, self.cache, prepared, **options)
        assert torch.equal(again.nan_to_num(7.5), found.nan_to_num(7.5)), "a second layer"
        return list(found.split([len(part) for part in parts]))

    def expected(self, row: int, window: int | None) -> np.ndarray:
        start, count = self.rows[row]
        positions = np.arange(start + count)
        blocks = self.tables[row][positions // self.block_size].astype(np.int64)
        stored = self.cache[:, blocks, :, positions % self.block_size].double().numpy()
        queries = self.queries[self.tokens[row]].double().numpy()
        keys, values = (np.repeat(stored[:, part], queries.shape[1] // self.kv_heads, axis=1) for part in (0, 1))
        scores = SCALE * np.einsum("tnd,jnd->ntj", queries, keys)
        if self.soft_cap is not None:
            scores = self.soft_cap * np.tanh(scores / self.soft_cap)
        distance = (start + np.arange(count))[:, None] - positions
        scores = np.where((distance >= 0) & (distance < (window or 1 << 40)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        totals = weights.sum(-1, keepdims=True)
        if self.sinks is not None:
            totals += np.exp(self.sinks.double().numpy()[:, None, None] - scores.max(-1, keepdims=True))
        return np.einsum("ntj,jnd->tnd", weights / totals, values)

    def check(self, window: int | None) -> None:
        for row, found in enumerate(self.attend(self.whole(), window)):
            error = worst_error(found, self.expected(row, window))
            # Scores, which are not divided by more for larger heads, have as large errors as they are.
            bound = BOUNDS[self.cache.dtype] * max(1.0, self.queries.shape[-1] / 64)
            assert error <= bound, (self.rows[row], window, error)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("window", [None, 1, 2, 17, 64, 255, 256, 300])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_windows(seed: int, dtype: torch.dtype, window: int | None) -> None:
    Runs(seed, dtype=dtype).check(window)


@pytest.mark.parametrize("block_size", [1, 3, 32, 512])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_block_sizes(seed: int, dtype: torch.dtype, block_size: int) -> None:
    Runs(seed, dtype=dtype, heads=(2, 2), head_size=32, block_size=block_size).check(None)


@pytest.mark.parametrize("head_size", [1, 6, 16, 24, 32, 48, 64, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (10, 2), (9, 1), (100, 1)])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_heads(seed: int, dtype: torch.dtype, heads: tuple[int, int], head_size: int) -> None:
    rows = ((0, 3), (5, 31), (240, 20), (0, 70))
    Runs(seed, rows, dtype=dtype, heads=heads, head_size=head_size).check(None)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("window", [None, 3, 90, 290])
@pytest.mark.parametrize(("heads", "head_size"), [((6, 2), 64), ((1, 1), 32), ((5, 1), 20), ((4, 2), 96)])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_any_cut_gives_the_bits_of_decoding(
    seed: int, dtype: torch.dtype, heads: tuple[int, int], head_size: int, window: int | None
) -> None:
    draw, length = np.random.default_rng(seed), 600
    runs = Runs(seed, ((0, length), (0, 40)), dtype=dtype, heads=heads, head_size=head_size)
    expected = runs.attend(runs.whole(), window)[0]
    every = runs.attend([(0, position, position + 1) for position in range(0, length, 7)], window)
    assert torch.equal(torch.cat(every), expected[::7]), "decoded"
    for largest in (5, 100, 400):
        cuts = [0, *np.cumsum(draw.integers(1, largest + 1, length)).tolist()]
        cuts = [*(cut for cut in cuts if cut < length), length]
        pieces = [(0, first, end) for first, end in pairwise(cuts)]
        mates = [(1, 3, 30), (1, 0, 1)]
        order = draw.permutation(len(pieces) + len(mates))
        mixed = [(pieces + mates)[place] for place in order]
        for piece, found in zip(mixed, runs.attend(mixed, window), strict=True):
            if piece[0] == 0:
                assert torch.equal(found, expected[piece[1] : piece[2]]), piece


@pytest.mark.parametrize(("soft_cap", "has_sinks"), [(0.7, False), (None, True), (20.0, True)])
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_caps_and_sinks(
    seed: int, dtype: torch.dtype, window: int | None, soft_cap: float | None, has_sinks: bool
) -> None:
    """Scores have a standard deviation of 1.6: some are at the smaller cap, most are far below the larger."""
    length = 600
    runs = Runs(seed, ((0, length), *ROWS), dtype=dtype)
    runs.soft_cap = soft_cap
    runs.sinks = 4 * torch.randn(6, generator=torch.Generator().manual_seed(seed)) if has_sinks else None
    runs.check(window)
    expected = runs.attend(runs.whole(), window)[0]
    every = runs.attend([(0, position, position + 1) for position in range(0, length, 7)], window)
    assert torch.equal(torch.cat(every), expected[::7]), "decoded"


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_many_random_steps(seed: int, dtype: torch.dtype) -> None:
    draw = np.random.default_rng(seed)
    for _ in range(6):
        starts, counts = draw.integers(0, 600, 3), draw.integers(2, 120, 3)
        rows = tuple((int(start), int(count)) for start, count in zip(starts, counts, strict=True))
        kv_heads, group = int(draw.integers(1, 4)), int(draw.integers(1, 9))
        heads, head_size = (kv_heads * group, kv_heads), int(draw.choice([8, 32, 64, 72, 128]))
        window = None if draw.random() < 0.4 else int(draw.integers(1, 500))
        block_size = int(draw.integers(1, 40))
        runs = Runs(seed, rows, dtype=dtype, heads=heads, head_size=head_size, block_size=block_size)
        runs.check(window)


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_only_its_rows_are_written(seed: int, dtype: torch.dtype) -> None:
    """Rows of one token stand between; their places are for decoding to write."""
    runs = Runs(seed, ((0, 1), (4, 60), (9, 1), (0, 2), (300, 1)), dtype=dtype, head_size=80)
    prefill = runs.plan(runs.whole(), None).prefill
    assert isinstance(prefill, PagedRuns)
    prepared = prepare_paged_runs(prefill, runs.cache, heads=6)
    out = torch.full(runs.queries.shape, 7.5, dtype=dtype)
    attend_paged_runs(runs.queries, runs.cache, prepared, AttentionOptions(scale=SCALE), out_TND=out)
    for row, (_, count) in enumerate(runs.rows):
        own = out[runs.tokens[row]]
        if count == 1:
            assert (own == 7.5).all()
        else:
            assert worst_error(own, runs.expected(row, None)) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("part", [0, 1])
def test_a_broken_key_or_value_breaks_its_row_alone(seed: int, dtype: torch.dtype, part: int) -> None:
    runs = Runs(seed, dtype=dtype)
    before = runs.attend(runs.whole(), None)
    for row, place in ((5, 100), (8, 299), (3, 256)):
        start, count = runs.rows[row]
        block = int(runs.tables[row, place // 16])
        kept = runs.cache[part, block, 0, place % 16].clone()
        runs.cache[part, block, 0, place % 16] = math.nan
        found = runs.attend(runs.whole(), None)
        runs.cache[part, block, 0, place % 16] = kept
        # Heads of the first KV head, from the position on that sees it.
        assert found[row][max(0, place - start) :, :3].isnan().all() and place < start + count
        assert torch.equal(found[row][:, 3:], before[row][:, 3:])
        assert all(torch.equal(found[other], before[other]) for other in range(len(runs.rows)) if other != row)


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_scores_far_apart(seed: int, dtype: torch.dtype) -> None:
    """One key outweighs all others, in an early span, a late one, or its own: nothing overflows or is lost.

    Large scores have large roundings, by which weights change.
    """
    runs = Runs(seed, ((0, 600),), dtype=dtype, heads=(2, 1), head_size=32)
    for place, size in ((3, 60.0), (550, 60.0), (255, -60.0), (256, 200.0)):
        block = int(runs.tables[0, place // 16])
        kept = runs.cache[0, block, 0, place % 16].clone()
        runs.cache[0, block, 0, place % 16] *= size
        (found,) = runs.attend(runs.whole(), None)
        assert worst_error(found, runs.expected(0, None)) <= max(BOUNDS[dtype], 1e-3), (place, size)
        runs.cache[0, block, 0, place % 16] = kept


@pytest.mark.parametrize("block", [-1, 10**6])
def test_a_block_that_is_not_there_is_refused(seed: int, block: int) -> None:
    runs = Runs(seed, ((5, 4), (17, 25)), dtype=torch.float32, heads=(1, 1))
    runs.tables[1, 1] = block
    with pytest.raises(IndexError, match=f"{block} .*are read from a cache|to {block} are read from a cache"):
        runs.attend(runs.whole(), None)
    runs.attend([(1, 40, 42)], 8)


def test_a_position_behind_its_table_is_refused(seed: int) -> None:
    runs = Runs(seed, ((5, 4), (17, 25)), dtype=torch.float32, heads=(1, 1))
    runs.tables = runs.tables[:, :2]
    with pytest.raises(IndexError, match="position 41 is not in a table of 2 blocks"):
        runs.attend(runs.whole(), None)


@pytest.mark.parametrize(("feature", "lanes"), [("avx512bf16", 16), ("avx512f", 8), ("avx", 4)])
def test_machines_with_other_vectors(seed: int, tmp_path: Path, feature: str, lanes: int) -> None:
    here = compiled_or_skip().lanes
    if here < lanes:
        pytest.skip(f"this machine has vectors of {here} lanes")
    with compiled_without(feature, tmp_path):
        assert compiled_or_skip().lanes == lanes
        for dtype in BOUNDS:
            for heads, head_size in (((6, 2), 64), ((5, 1), 24), ((2, 2), 3), ((4, 1), 96)):
                runs = Runs(seed, ((250, 30), (3, 20)), dtype=dtype, heads=heads, head_size=head_size, block_size=7)
                for window in (None, 9):
                    runs.check(window)
                    found, _ = runs.attend(runs.whole(), window)
                    decoded = runs.attend([(0, 250 + place, 251 + place) for place in range(30)], window)
                    assert torch.equal(torch.cat(decoded), found)
