"""Decode attention's kernel against its reference, and the reference against a softmax in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from slipstream.kernels import backends
from slipstream.kernels.attention_decode import (
    TYPES,
    attention_decode_configs,
    decode_attention,
    decode_attention_reference,
)
from slipstream.kernels.attention_items import DecodeItems, decode_items
from slipstream.kernels.attention_span import SPAN_KEYS, AttentionOptions

CPU = torch.device("cpu")
CLOSE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of one token over a cache that is NaN wherever no row may look; tables lead nowhere there."""

    positions: list[int]
    tables: np.ndarray
    cache: torch.Tensor
    q_TND: torch.Tensor

    def items(self, window: int | None, *, rows: list[int] | None = None, capacity: int | None = None) -> DecodeItems:
        """Return items of some rows, which stand in q backwards."""
        rows = list(range(len(self.positions))) if rows is None else rows
        return decode_items(
            np.array([self.positions[row] for row in rows]),
            np.arange(len(rows))[::-1].copy(),
            self.tables[rows],
            window=window,
            device=CPU,
            capacity=capacity,
        )


def make_batch(
    positions: list[int],
    *,
    heads: tuple[int, int] = (4, 2),
    head_size: int = 64,
    block_size: int = 8,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    window: int | None = None,
) -> Batch:
    """Return a random batch."""
    columns = max(positions) // block_size + 2
    tables = torch.randperm(len(positions) * columns + 1)[: len(positions) * columns].reshape(len(positions), columns)
    cache = torch.full((2, len(positions) * columns + 1, heads[1], block_size, head_size), math.nan)
    lowest = [max(position - (window or 1 << 30) + 1, 0) for position in positions]
    for row, position in enumerate(positions):
        for key in range(lowest[row], position + 1):
            cache[:, tables[row, key // block_size], :, key % block_size] = torch.randn(2, heads[1], head_size)
        tables[row, position // block_size + 1 :] = 1 << 29
        tables[row, : lowest[row] // block_size] = -(1 << 29)
    return Batch(
        positions=positions,
        tables=tables.int().numpy(),
        cache=cache.to(cache_dtype or dtype),
        q_TND=torch.randn(len(positions), heads[0], head_size).to(dtype),
    )


def both(batch: Batch, items: DecodeItems, options: AttentionOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the kernel and the reference compute."""
    computed, expected = torch.empty_like(batch.q_TND), torch.empty_like(batch.q_TND)
    decode_attention(batch.q_TND, batch.cache, items, options, computed)
    decode_attention_reference(batch.q_TND, batch.cache, items, options, expected)
    return computed, expected


@pytest.mark.parametrize(("dtype", "cache_dtype"), TYPES)
@pytest.mark.parametrize(
    ("heads", "head_size", "block_size"), [((2, 2), 64, 8), ((7, 1), 80, 16), ((18, 1), 32, 64), ((6, 2), 256, 24)]
)
def test_kernel_is_the_reference(
    heads: tuple[int, int],
    head_size: int,
    block_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    seed: int,
    launches: list[str],
) -> None:
    torch.manual_seed(seed)
    batch = make_batch(
        [0, 37, 63],
        heads=heads,
        head_size=head_size,
        block_size=block_size,
        dtype=dtype,
        cache_dtype=cache_dtype,
    )
    options = AttentionOptions(scale=head_size**-0.5, k_scale=1.5, v_scale=0.7)
    computed, expected = both(batch, batch.items(None), options)
    torch.testing.assert_close(computed, expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    assert launches == ["_attention_decode_kernel", "_attention_merge_kernel"]


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 1, 40])
def test_what_a_layer_can_ask_for(window: int | None, soft_cap: float | None, has_sinks: bool, seed: int) -> None:
    torch.manual_seed(seed)
    batch = make_batch([50, 3], window=window)
    options = AttentionOptions(
        scale=1.0, window=window, soft_cap=soft_cap, sinks_N=torch.randn(4) * 3 if has_sinks else None
    )
    computed, expected = both(batch, batch.items(window), options)
    torch.testing.assert_close(computed, expected, rtol=2e-5, atol=2e-5)


def test_spans_of_long_rows(seed: int) -> None:
    torch.manual_seed(seed)
    window = SPAN_KEYS + 60
    positions = [SPAN_KEYS - 1, SPAN_KEYS, 2 * SPAN_KEYS + 30]
    batch = make_batch(positions, heads=(2, 1), block_size=32, window=window)
    items = batch.items(window)
    assert items.items_2C.tolist() == [[0, 1, 1, 2, 2, 2], [0, 0, 1, 0, 1, 2]]
    assert items.first_items_R1.tolist() == [0, 1, 3, 6]
    computed, expected = both(batch, items, AttentionOptions(scale=0.125, window=window))
    torch.testing.assert_close(computed, expected, rtol=2e-6, atol=2e-6)


def test_padded_rows_and_items_left_out(seed: int) -> None:
    torch.manual_seed(seed)
    batch = make_batch([5, 9, 20])
    padded = replace(batch, positions=[5, -1, 20])
    items = padded.items(None, capacity=7)
    assert items.items_2C.shape == (2, 7)
    computed, expected = both(padded, items, AttentionOptions(scale=0.125))
    torch.testing.assert_close(computed, expected, rtol=2e-6, atol=2e-6)
    assert not computed[1].any()
    with pytest.raises(ValueError, match="capacity of 1"):
        padded.items(None, capacity=1)


def test_items_in_any_order_give_the_same_bits(seed: int) -> None:
    torch.manual_seed(seed)
    batch = make_batch([SPAN_KEYS + 3, 30], heads=(2, 1), block_size=32)
    items = batch.items(None)
    turned = replace(items, items_2C=items.items_2C.flip(1).contiguous())
    options = AttentionOptions(scale=0.125)
    first, second = torch.empty_like(batch.q_TND), torch.empty_like(batch.q_TND)
    decode_attention(batch.q_TND, batch.cache, items, options, first)
    decode_attention(batch.q_TND, batch.cache, turned, options, second)
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_in_any_company(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    batch = make_batch([70, 2, SPAN_KEYS + 1], heads=(3, 1), block_size=16, dtype=dtype)
    options = AttentionOptions(scale=0.125)
    together = torch.empty_like(batch.q_TND)
    decode_attention(batch.q_TND, batch.cache, batch.items(None), options, together)
    for row in range(3):
        alone = torch.empty_like(batch.q_TND[:1])
        place = 2 - row
        own_q = batch.q_TND[place : place + 1].clone()
        decode_attention(own_q, batch.cache, batch.items(None, rows=[row]), options, alone)
        assert torch.equal(alone[0], together[place])


def test_each_configuration(seed: int) -> None:
    torch.manual_seed(seed)
    batch = make_batch([100], heads=(2, 1), head_size=128, block_size=16, dtype=torch.bfloat16)
    items, options = batch.items(None), AttentionOptions(scale=0.1)
    _, expected = both(batch, items, options)
    for config in attention_decode_configs(128, torch.bfloat16, torch.bfloat16):
        computed = torch.empty_like(expected)
        decode_attention(batch.q_TND, batch.cache, items, options, computed, config)
        torch.testing.assert_close(computed, expected, rtol=1.6e-2, atol=1.6e-2)


def test_queries_inside_a_larger_tensor(seed: int) -> None:
    torch.manual_seed(seed)
    batch = make_batch([12, 4])
    options = AttentionOptions(scale=0.125)
    _, expected = both(batch, batch.items(None), options)
    wide = torch.full((2, 7, 64), math.nan)
    wide[:, 1:5] = batch.q_TND
    turned = batch.q_TND.transpose(1, 2).contiguous().transpose(1, 2)
    for q_TND in (wide[:, 1:5], turned):
        computed = torch.empty_like(expected)
        decode_attention(q_TND, batch.cache, batch.items(None), options, computed)
        torch.testing.assert_close(computed, expected, rtol=2e-6, atol=2e-6)


def test_no_rows(launches: list[str]) -> None:
    items = decode_items(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 3), np.int32), window=None, device=CPU)
    out = torch.empty(0, 4, 64)
    decode_attention(torch.empty(0, 4, 64), torch.empty(2, 3, 2, 8, 64), items, AttentionOptions(scale=1.0), out)
    assert launches == []


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 3, 3, 8, 64), torch.float32),
        ((2, 3, 2, 8, 32), torch.float32),
        ((2, 3, 2, 8, 64), torch.float16),
        ((2, 3, 2, 8, 64), torch.float8_e4m3fn),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    items = decode_items(np.zeros(1, int), np.zeros(1, int), np.zeros((1, 3), np.int32), window=None, device=CPU)
    q_TND = torch.zeros(1, 4, 64)
    with pytest.raises(ValueError, match="layer_cache"):
        decode_attention(q_TND, torch.zeros(shape, dtype=dtype), items, AttentionOptions(scale=1.0), q_TND.clone())


def test_heads_that_are_too_long_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 256"):
        attention_decode_configs(288, torch.float32, torch.float32)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_reference_is_a_float64_softmax(soft_cap: float | None, has_sinks: bool, seed: int) -> None:
    torch.manual_seed(seed)
    backends.use("torch")
    window = 9
    batch = make_batch([20, 6], window=window, block_size=4)
    sinks_N = torch.randn(4) if has_sinks else None
    options = AttentionOptions(scale=0.3, window=window, soft_cap=soft_cap, sinks_N=sinks_N, k_scale=0.5, v_scale=2.0)
    computed = torch.empty_like(batch.q_TND)
    decode_attention(batch.q_TND, batch.cache, batch.items(window), options, computed)
    for row, position in enumerate(batch.positions):
        keys = np.arange(max(0, position - window + 1), position + 1)
        stored = batch.cache[:, batch.tables[row, keys // 4], :, keys % 4].double()
        for head in range(4):
            q_D = batch.q_TND[1 - row, head].double()
            scores = (stored[:, 0, head // 2] @ q_D) * 0.3 * 0.5
            if soft_cap is not None:
                scores = soft_cap * (scores / soft_cap).tanh()
            weights = scores.exp()
            total = weights.sum() + (sinks_N[head].double().exp() if sinks_N is not None else 0)
            expected = (weights @ stored[:, 1, head // 2]) / total * 2.0
            torch.testing.assert_close(computed[1 - row, head].double(), expected, rtol=2e-6, atol=2e-6)
