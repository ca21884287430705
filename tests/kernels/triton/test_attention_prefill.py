"""Prefill attention's kernel against its reference, the reference against decoding's, and chunks against each other."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from slipstream.kernels.attention_decode import TYPES, decode_attention, decode_attention_reference
from slipstream.kernels.attention_items import PrefillItems, decode_items, prefill_items
from slipstream.kernels.attention_prefill import prefill_attention, prefill_attention_reference, prefill_tile_rows
from slipstream.kernels.attention_span import SPAN_KEYS, AttentionOptions

CPU = torch.device("cpu")
CLOSE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of (start, count) over a cache that is NaN wherever no row may look; tables lead nowhere there."""

    rows: list[tuple[int, int]]
    tables: np.ndarray
    cache: torch.Tensor
    q_TND: torch.Tensor

    def items(self, *, deterministic: bool = False, capacity: int | None = None) -> PrefillItems:
        """Return items of all rows."""
        starts, counts = np.array(self.rows).reshape(-1, 2).T
        return self.items_of(starts, counts, deterministic=deterministic, capacity=capacity)

    def items_of(
        self,
        starts: np.ndarray,
        counts: np.ndarray,
        *,
        rows: slice = slice(None),
        deterministic: bool = False,
        capacity: int | None = None,
    ) -> PrefillItems:
        """Return items of some rows from ``starts`` on, whose queries stand one after the other."""
        return prefill_items(
            starts,
            counts,
            np.cumsum(counts) - counts,
            self.tables[rows],
            heads_per_kv=self.q_TND.shape[1] // self.cache.shape[2],
            tile_rows=prefill_tile_rows(
                self.q_TND.shape[2], self.q_TND.dtype, self.cache.dtype, deterministic=deterministic
            ),
            device=CPU,
            capacity=capacity,
        )


def make_batch(
    rows: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    head_size: int = 64,
    block_size: int = 8,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    window: int | None = None,
) -> Batch:
    """Return a random batch."""
    columns = max(start + count for start, count in rows) // block_size + 2
    tables = torch.randperm(len(rows) * columns).reshape(len(rows), columns)
    cache = torch.full((2, len(rows) * columns, heads[1], block_size, head_size), math.nan)
    for row, (start, count) in enumerate(rows):
        lowest = max(start - (window or 1 << 30) + 1, 0)
        for key in range(lowest, start + count):
            cache[:, tables[row, key // block_size], :, key % block_size] = torch.randn(2, heads[1], head_size)
        tables[row, (start + count - 1) // block_size + 1 :] = 1 << 29
        tables[row, : lowest // block_size] = -(1 << 29)
    return Batch(
        rows=rows,
        tables=tables.int().numpy(),
        cache=cache.to(cache_dtype or dtype),
        q_TND=torch.randn(sum(count for _, count in rows), heads[0], head_size).to(dtype),
    )


def both(batch: Batch, options: AttentionOptions, *, deterministic: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the kernel and the reference compute."""
    computed, expected = torch.empty_like(batch.q_TND), torch.empty_like(batch.q_TND)
    items = batch.items(deterministic=deterministic)
    prefill_attention(batch.q_TND, batch.cache, items, options, computed)
    prefill_attention_reference(batch.q_TND, batch.cache, items, options, expected)
    return computed, expected


@pytest.mark.parametrize(("dtype", "cache_dtype"), TYPES)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("heads", "head_size", "block_size"), [((2, 1), 64, 16), ((7, 1), 80, 24), ((18, 1), 16, 64), ((4, 2), 256, 8)]
)
def test_kernel_is_the_reference(
    heads: tuple[int, int],
    head_size: int,
    block_size: int,
    deterministic: bool,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    seed: int,
    launches: list[str],
) -> None:
    torch.manual_seed(seed)
    batch = make_batch(
        [(0, 5), (40, 2)],
        heads=heads,
        head_size=head_size,
        block_size=block_size,
        dtype=dtype,
        cache_dtype=cache_dtype,
    )
    options = AttentionOptions(scale=head_size**-0.5, k_scale=1.5, v_scale=0.7)
    computed, expected = both(batch, options, deterministic=deterministic)
    torch.testing.assert_close(computed, expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    assert launches == ["_attention_prefill_kernel"]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("window", [1, 3, 100])
def test_what_a_layer_can_ask_for(
    window: int, soft_cap: float | None, has_sinks: bool, deterministic: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    batch = make_batch([(150, 9)], heads=(2, 1), block_size=16, dtype=torch.float16, window=window)
    options = AttentionOptions(
        scale=0.5, window=window, soft_cap=soft_cap, sinks_N=torch.randn(2) * 3 if has_sinks else None
    )
    computed, expected = both(batch, options, deterministic=deterministic)
    torch.testing.assert_close(computed, expected, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("count", [33, 70])
def test_whole_tiles_of_keys_and_the_edges_around_them(count: int, seed: int) -> None:
    """Tiles of 128 rows and 64 keys: those at the window's beginning and at the diagonal are masked, others not."""
    torch.manual_seed(seed)
    for window in (None, 97, 180):
        batch = make_batch([(190, count)], heads=(2, 1), block_size=16, dtype=torch.float16, window=window)
        computed, expected = both(batch, AttentionOptions(scale=0.125, window=window))
        torch.testing.assert_close(computed, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 30])
def test_any_chunks_give_the_same_bits(dtype: torch.dtype, window: int | None, seed: int) -> None:
    torch.manual_seed(seed)
    batch = make_batch([(0, 21)], heads=(3, 1), block_size=16, dtype=dtype)
    options = AttentionOptions(scale=0.125, window=window)
    whole = torch.empty_like(batch.q_TND)
    prefill_attention(batch.q_TND, batch.cache, batch.items(), options, whole)
    first = 0
    for count in (1, 13, 7):
        chunk = batch.q_TND[first : first + count]
        computed = torch.empty_like(chunk)
        items = batch.items_of(np.array([first]), np.array([count]))
        prefill_attention(chunk, batch.cache, items, options, computed)
        assert torch.equal(computed, whole[first : first + count])
        first += count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_deterministic_chunks_have_the_bits_of_decoding(dtype: torch.dtype, has_sinks: bool, seed: int) -> None:
    torch.manual_seed(seed)
    start, count, window = SPAN_KEYS - 3, 6, SPAN_KEYS - 1
    batch = make_batch([(start, count)], heads=(3, 1), block_size=32, dtype=dtype)
    sinks_N = torch.randn(3) if has_sinks else None
    options = AttentionOptions(scale=0.125, window=window, sinks_N=sinks_N, soft_cap=20.0 if has_sinks else None)
    chunk, decoded = torch.empty_like(batch.q_TND), torch.empty_like(batch.q_TND)
    prefill_attention(batch.q_TND, batch.cache, batch.items(deterministic=True), options, chunk)
    items = decode_items(
        start + np.arange(count), np.arange(count), batch.tables.repeat(count, 0), window=window, device=CPU
    )
    decode_attention(batch.q_TND, batch.cache, items, options, decoded)
    assert torch.equal(chunk, decoded)


def test_a_row_is_the_same_in_any_company(seed: int) -> None:
    torch.manual_seed(seed)
    batch = make_batch([(4, 9), (30, 3)], heads=(3, 1), block_size=16, dtype=torch.bfloat16)
    options = AttentionOptions(scale=0.125)
    together = torch.empty_like(batch.q_TND)
    prefill_attention(batch.q_TND, batch.cache, batch.items(capacity=7), options, together)
    alone = torch.empty_like(batch.q_TND[9:])
    items = batch.items_of(np.array([30]), np.array([3]), rows=slice(1, 2))
    prefill_attention(batch.q_TND[9:], batch.cache, items, options, alone)
    assert torch.equal(together[9:], alone)


def test_the_longest_tiles_come_first() -> None:
    items = prefill_items(
        np.array([0, 100]),
        np.array([9, 3]),
        np.array([0, 9]),
        np.zeros((2, 20), np.int32),
        heads_per_kv=4,
        tile_rows=16,
        device=CPU,
        capacity=5,
    )
    assert items.tiles_2C.tolist() == [[1, 0, 0, 0, 0], [0, 8, 4, 0, 0]]
    assert items.tile_count_1.tolist() == [4]
    with pytest.raises(ValueError, match="capacity of 3"):
        prefill_items(
            np.array([0]),
            np.array([13]),
            np.array([0]),
            np.zeros((1, 9), int),
            heads_per_kv=4,
            tile_rows=16,
            device=CPU,
            capacity=3,
        )


def test_no_rows(launches: list[str]) -> None:
    batch = make_batch([(0, 1)])
    items = batch.items_of(np.zeros(0, int), np.zeros(0, int), rows=slice(0, 0))
    out = torch.empty(0, 4, 64)
    prefill_attention(torch.empty(0, 4, 64), batch.cache, items, AttentionOptions(scale=1.0), out)
    assert launches == []


def test_what_does_not_fit_is_refused() -> None:
    batch = make_batch([(0, 2)])
    items = prefill_items(
        np.array([0]), np.array([2]), np.array([0]), batch.tables, heads_per_kv=2, tile_rows=256, device=CPU
    )
    options = AttentionOptions(scale=1.0)
    with pytest.raises(ValueError, match="prefill_tile_rows"):
        prefill_attention(batch.q_TND, batch.cache, items, options, batch.q_TND.clone())
    with pytest.raises(ValueError, match="out_TND"):
        prefill_attention(batch.q_TND, batch.cache, batch.items(), options, batch.q_TND[:1].clone())
    with pytest.raises(ValueError, match="layer_cache"):
        prefill_attention(batch.q_TND, batch.cache.half(), batch.items(), options, batch.q_TND.clone())


def test_reference_is_decoding_position_by_position(seed: int) -> None:
    torch.manual_seed(seed)
    batch = make_batch([(0, 3), (11, 4)], window=5)
    options = AttentionOptions(scale=0.3, window=5, soft_cap=4.0, sinks_N=torch.randn(4))
    chunk, decoded = torch.empty_like(batch.q_TND), torch.empty_like(batch.q_TND)
    prefill_attention_reference(batch.q_TND, batch.cache, batch.items(), options, chunk)
    positions = np.concatenate([start + np.arange(count) for start, count in batch.rows])
    rows = np.repeat([0, 1], [3, 4])
    items = decode_items(positions, np.arange(7), batch.tables[rows], window=5, device=CPU)
    decode_attention_reference(batch.q_TND, batch.cache, items, options, decoded)
    torch.testing.assert_close(chunk, decoded, rtol=1e-6, atol=1e-6)
