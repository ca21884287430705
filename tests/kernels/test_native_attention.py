"""Compiled decode attention against float64; it reads nothing that its rows do not see; a row's bits are its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from slipstream.kernels.attention import paged_attention, prepare_attention
from slipstream.kernels.attention_plan import build_attention_plan
from slipstream.kernels.cpu.attention_paged import PagedRows
from slipstream.kernels.cpu.attention_workspace import AttentionWorkspace
from slipstream.tests.kernels.rounding import worst_error

pytestmark = pytest.mark.usefixtures("compiled")

CPU = torch.device("cpu")
BOUNDS = {torch.float32: 1.5e-5, torch.bfloat16: 2e-2}
POSITIONS = (0, 1, 14, 15, 16, 17, 100, 254, 255, 256, 257, 511, 512, 700)


class Batch:
    """Sequences whose last position is decoded; the cache holds no number where they have none."""

    def __init__(
        self,
        seed: int,
        positions: tuple[int, ...],
        *,
        dtype: torch.dtype,
        heads: tuple[int, int],
        head_size: int,
        block_size: int,
    ) -> None:
        draw = np.random.default_rng(seed)
        self.positions, self.block_size, self.kv_heads = positions, block_size, heads[1]
        most = max(positions) // block_size + 1
        blocks = len(positions) * most
        free = list(draw.permutation(blocks))
        self.tables = np.full((len(positions), most + 1), 2**31 - 1, np.int32)  # what must not be read is no block
        self.cache = torch.full((2, blocks, heads[1], block_size, head_size), math.nan, dtype=dtype)
        for row, position in enumerate(positions):
            for place in range(position + 1):
                if place % block_size == 0:
                    self.tables[row, place // block_size] = free.pop()
                block = int(self.tables[row, place // block_size])
                numbers = torch.from_numpy(draw.standard_normal((2, heads[1], head_size)))
                self.cache[:, block, :, place % block_size] = numbers.to(dtype)
        wide = torch.from_numpy(draw.standard_normal((len(positions), heads[0] + 2, head_size))).to(dtype)
        self.queries = wide[:, : heads[0]]

    def attend(self, window: int | None, rows: list[int]) -> torch.Tensor:
        plan = build_attention_plan(
            starts=np.array([self.positions[row] for row in rows], np.int32),
            counts=np.ones(len(rows), np.int32),
            block_tables=self.tables[rows],
            block_size=self.block_size,
            heads=self.queries.shape[1],
            kv_heads=self.kv_heads,
            head_size=self.queries.shape[-1],
            window=window,
            dtype=self.cache.dtype,
            device=CPU,
        )
        assert isinstance(plan.decode, PagedRows)
        # All of them in order are a slice of wider rows, as they come from the fused product.
        queries = self.queries if rows == list(range(len(self.positions))) else self.queries[rows]
        workspace = AttentionWorkspace(dtype=self.cache.dtype, device=CPU)
        prepared = prepare_attention(plan, self.cache, tokens=len(rows), heads=queries.shape[1], workspace=workspace)
        found = paged_attention(queries, self.cache, prepared, scale=0.2)
        again = paged_attention(queries, self.cache, prepared, scale=0.2)
        assert torch.equal(again.nan_to_num(7.5), found.nan_to_num(7.5)), "a second layer"
        return found

    def expected(self, row: int, window: int | None) -> np.ndarray:
        last = self.positions[row]
        seen = np.arange(max(0, last + 1 - (window or last + 1)), last + 1)
        blocks = self.tables[row][seen // self.block_size].astype(np.int64)
        stored = self.cache[:, blocks, :, seen % self.block_size].double().numpy()
        query = self.queries[row].double().numpy()
        keys, values = (np.repeat(stored[:, part], len(query) // self.kv_heads, axis=1) for part in (0, 1))
        scores = 0.2 * np.einsum("nd,jnd->nj", query, keys)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("nj,jnd->nd", weights / weights.sum(-1, keepdims=True), values)

    def check(self, window: int | None) -> None:
        every = list(range(len(self.positions)))
        found = self.attend(window, every)
        for row in every:
            error = worst_error(found[row], self.expected(row, window))
            # Scores, which are not divided by more for larger heads, have as large errors as they are.
            bound = BOUNDS[self.cache.dtype] * max(1.0, self.queries.shape[-1] / 64)
            assert error <= bound, (self.positions[row], window, error)
        for rows in ([0], [3], [len(every) - 1], every[4:9], every[::-1]):
            assert torch.equal(self.attend(window, rows), found[rows]), rows


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("window", [None, 1, 2, 17, 256, 300])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_windows(seed: int, dtype: torch.dtype, window: int | None) -> None:
    Batch(seed, POSITIONS, dtype=dtype, heads=(6, 2), head_size=64, block_size=16).check(window)


@pytest.mark.parametrize("block_size", [1, 3, 32, 512])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_block_sizes(seed: int, dtype: torch.dtype, block_size: int) -> None:
    Batch(seed, POSITIONS, dtype=dtype, heads=(2, 2), head_size=32, block_size=block_size).check(None)


@pytest.mark.parametrize("head_size", [1, 6, 16, 24, 32, 48, 64, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (10, 2), (9, 1)])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_heads(seed: int, dtype: torch.dtype, heads: tuple[int, int], head_size: int) -> None:
    positions = (0, 5, 31, 40, 63, 64, 90, 280, 2)
    Batch(seed, positions, dtype=dtype, heads=heads, head_size=head_size, block_size=16).check(None)


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("part", [0, 1])
def test_a_broken_key_or_value_breaks_its_row_alone(seed: int, dtype: torch.dtype, part: int) -> None:
    batch = Batch(seed, POSITIONS, dtype=dtype, heads=(2, 1), head_size=64, block_size=16)
    every = list(range(len(POSITIONS)))
    before = batch.attend(None, every)
    for row, place in ((6, 100), (6, 99), (13, 3)):
        block = int(batch.tables[row, place // 16])
        kept = batch.cache[part, block, 0, place % 16].clone()
        batch.cache[part, block, 0, place % 16] = math.nan
        found = batch.attend(None, every)
        batch.cache[part, block, 0, place % 16] = kept
        assert found[row].isnan().all()
        others = [other for other in every if other != row]
        assert torch.equal(found[others], before[others])


@pytest.mark.parametrize("block", [-1, 10**6])
def test_a_block_that_is_not_there_is_refused(seed: int, block: int) -> None:
    batch = Batch(seed, (5, 40), dtype=torch.float32, heads=(1, 1), head_size=16, block_size=16)
    batch.tables[1, 1] = block
    with pytest.raises(IndexError, match=f"{block} .*are read from a cache|to {block} are read from a cache"):
        batch.attend(None, [0, 1])
    batch.attend(8, [0])


def test_a_position_behind_its_table_is_refused(seed: int) -> None:
    batch = Batch(seed, (5, 40), dtype=torch.float32, heads=(1, 1), head_size=16, block_size=16)
    batch.tables = batch.tables[:, :2]
    with pytest.raises(IndexError, match="position 40 is not in a table of 2 blocks"):
        batch.attend(None, [0, 1])
