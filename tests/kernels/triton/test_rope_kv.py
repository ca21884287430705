"""Rotary positions with the write of KV, against the reference, and that against complex numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from slipstream.kernels import backends
from slipstream.kernels.rope_kv import (
    kv_write_rows,
    read_kv,
    rotate_and_write_,
    rotate_and_write_reference_,
)

FLOAT8 = torch.float8_e4m3fn
BLOCKS, BLOCK_SIZE = 5, 4


@dataclass(frozen=True)
class Step:
    """The tokens of a step, and a cache that nobody has written to."""

    qkv_TSD: Tensor
    cos_TD: Tensor
    sin_TD: Tensor
    rows: Tensor
    cache: Tensor
    heads: int

    def run(self, way: object, **scales: float) -> tuple[Tensor, Tensor]:
        """Return the queries and the cache afterwards."""
        qkv_TSD, cache = self.qkv_TSD.clone(), self.cache.clone()
        assert callable(way)
        way(qkv_TSD, self.cos_TD, self.sin_TD, self.rows, cache, heads=self.heads, **scales)
        return qkv_TSD[:, : self.heads], cache.float()

    def token(self, index: int) -> Step:
        """Return the step of one of the tokens."""
        one, rows = slice(index, index + 1), self.rows.view(len(self.qkv_TSD), -1)
        return Step(self.qkv_TSD[one], self.cos_TD[one], self.sin_TD[one], rows[index].clone(), self.cache, self.heads)


def step_of(
    seed: int,
    *,
    tokens: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 64,
    dtype: torch.dtype = torch.float32,
    kept: torch.dtype | None = None,
) -> Step:
    torch.manual_seed(seed)
    angles = 10 * torch.randn(tokens, head_size // 2)
    sin = angles.sin()
    slots = torch.from_numpy(np.random.default_rng(seed).permutation(BLOCKS * BLOCK_SIZE)[:tokens])
    cache = torch.full((2, BLOCKS, kv_heads, BLOCK_SIZE, head_size), float("nan")).to(kept or dtype)
    return Step(
        qkv_TSD=torch.randn(tokens, heads + 2 * kv_heads, head_size).to(dtype),
        cos_TD=torch.cat([angles.cos()] * 2, -1).to(dtype),
        sin_TD=torch.cat([-sin, sin], -1).to(dtype),
        rows=kv_write_rows(slots, num_blocks=BLOCKS, kv_heads=kv_heads, block_size=BLOCK_SIZE),
        cache=cache,
        heads=heads,
    )


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """What nobody wrote is as it was, no number; the rest differs in the last bit at most."""
    close = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_size"),
    [(3, 4, 2, 64), (1, 1, 1, 2), (2, 9, 1, 6), (2, 40, 3, 80), (0, 2, 1, 8)],
)
def test_kernel_is_the_reference(
    tokens: int, heads: int, kv_heads: int, head_size: int, dtype: torch.dtype, seed: int, launches: list[str]
) -> None:
    step = step_of(seed, tokens=tokens, heads=heads, kv_heads=kv_heads, head_size=head_size, dtype=dtype)
    expected = step.run(rotate_and_write_reference_)
    assert_same(step.run(rotate_and_write_), expected, dtype)
    assert launches == (["_rope_kv_kernel"] if tokens else [])
    backends.use("auto")
    assert_same(step.run(rotate_and_write_), expected, dtype)


def test_reference_turns_pairs_as_complex_numbers(seed: int) -> None:
    step = step_of(seed)
    queries_TND, cache = step.run(rotate_and_write_reference_)
    pairs = torch.complex(*step.qkv_TSD.double().chunk(2, dim=-1))
    turned = pairs * torch.complex(step.cos_TD[:, None, :32].double(), step.sin_TD[:, None, 32:].double())
    expected = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(queries_TND.double(), expected[:, :4], rtol=1e-5, atol=1e-5)
    kept = read_kv(step.rows, cache).double()
    torch.testing.assert_close(kept[:, :2], expected[:, 4:6], rtol=1e-5, atol=1e-5)
    assert torch.equal(kept[:, 2:], step.qkv_TSD[:, 6:].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_cache_of_float8_has_scales(dtype: torch.dtype, seed: int, launches: list[str]) -> None:
    step = step_of(seed, dtype=dtype, kept=FLOAT8, head_size=80)
    step.qkv_TSD[0, 6, 0] = 5
    scales = {"k_scale": 0.03, "v_scale": 0.007}
    queries_TND, cache = step.run(rotate_and_write_, **scales)
    expected_TND, expected = step.run(rotate_and_write_reference_, **scales)
    assert_same((queries_TND, queries_TND), (expected_TND, expected_TND), dtype)
    # Keys may be rounded to the neighbour where they differ before; values never differ.
    torch.testing.assert_close(cache[0], expected[0], rtol=0.126, atol=2**-9, equal_nan=True)
    torch.testing.assert_close(cache[1], expected[1], rtol=0, atol=0, equal_nan=True)
    # What is too large for its scale is cut off at the largest number that there is.
    values = read_kv(step.rows, cache)[:, 2:]
    assert values.abs().max() == 448
    torch.testing.assert_close(values * 0.007, step.qkv_TSD[:, 6:].float().clamp(-3.136, 3.136), rtol=1 / 15, atol=1e-4)
    assert launches == (["_rope_kv_kernel"] if dtype == torch.bfloat16 else [])


def test_what_is_no_number_stays_so_in_float8(seed: int) -> None:
    step = step_of(seed, tokens=2, dtype=torch.bfloat16, kept=FLOAT8)
    step.cache.fill_(0)
    step.qkv_TSD[0, 6, 3] = float("nan")
    for way in (rotate_and_write_, rotate_and_write_reference_):
        assert step.run(way)[1].isnan().sum() == 1


def test_heads_of_a_wider_product_are_placed(seed: int) -> None:
    step, wide_TSD = step_of(seed), torch.full((3, 11, 64), float("nan"))
    wide_TSD[:, :8] = step.qkv_TSD
    expected_TND, expected = step.run(rotate_and_write_reference_)
    cache = step.cache.clone()
    rotate_and_write_(wide_TSD[:, :8], step.cos_TD, step.sin_TD, step.rows, cache, heads=4)
    assert_same((wide_TSD[:, :4], cache), (expected_TND, expected), torch.float32)
    assert wide_TSD[:, 8:].isnan().all()


@pytest.mark.parametrize("kept", [torch.bfloat16, FLOAT8])
def test_a_token_is_the_same_in_any_batch(kept: torch.dtype, seed: int) -> None:
    step = step_of(seed, tokens=6, dtype=torch.bfloat16, kept=kept)
    queries_TND, cache = step.run(rotate_and_write_)
    for index in (0, 4):
        alone = step.token(index)
        alone_TND, alone_cache = alone.run(rotate_and_write_)
        assert torch.equal(alone_TND[0], queries_TND[index])
        assert torch.equal(read_kv(alone.rows, alone_cache), read_kv(alone.rows, cache))
