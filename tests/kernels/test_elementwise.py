"""Norms, activation, rotary positions and linear against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slipstream.kernels.activation import silu_and_mul
from slipstream.kernels.linear import linear
from slipstream.kernels.norm import add_rms_norm, rms_norm
from slipstream.kernels.rope_kv import apply_rope_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Twice the spacing of numbers near 1: a result rounded twice.
RELATIVE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(found: torch.Tensor, expected: np.ndarray, *, relative: float, scale: float = 1.0) -> None:
    error = np.abs(found.double().numpy() - expected) / (np.abs(expected) + scale)
    assert error.max() <= relative


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(seed: int, dtype: torch.dtype) -> None:
    x, weight = random(seed, 7, 96, dtype=dtype), random(seed + 1, 96, dtype=dtype)
    x64 = x.double().numpy()
    expected = weight.double().numpy() * x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-5)
    assert_near(rms_norm(x, weight, 1e-5), expected, relative=RELATIVE[dtype])


def test_rms_norm_of_heads_takes_a_weight_per_head(seed: int) -> None:
    x, weight = random(seed, 5, 6, 16), random(seed + 1, 6, 16)
    heads = [rms_norm(x[:, head], weight[head], 1e-6) for head in range(6)]
    assert torch.equal(rms_norm(x, weight, 1e-6), torch.stack(heads, dim=1))


def test_rms_norm_epsilon_counts_for_small_values() -> None:
    x = torch.full((1, 4), 1e-3)
    assert_near(rms_norm(x, torch.ones(4), 1e-6), np.full((1, 4), 1 / np.sqrt(2)), relative=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_is_addition_then_norm(seed: int, dtype: torch.dtype) -> None:
    x, residual = random(seed, 3, 32, dtype=dtype), random(seed + 1, 3, 32, dtype=dtype)
    weight = random(seed + 2, 32, dtype=dtype)
    normed, total = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(x + residual, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_norms_do_not_depend_on_one_another(seed: int, dtype: torch.dtype) -> None:
    x, weight = random(seed, 33, 200, dtype=dtype), random(seed + 1, 200, dtype=dtype)
    together = rms_norm(x, weight, 1e-6)
    for row in range(33):
        assert torch.equal(rms_norm(x[row : row + 1], weight, 1e-6)[0], together[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(seed: int, dtype: torch.dtype) -> None:
    gate_up = random(seed, 9, 2 * 24, dtype=dtype)
    gate, up = np.split(gate_up.double().numpy(), 2, axis=-1)
    assert_near(silu_and_mul(gate_up), gate / (1 + np.exp(-gate)) * up, relative=2 * RELATIVE[dtype])


def test_silu_and_mul_leaves_its_argument() -> None:
    gate_up = torch.ones(2, 8)
    silu_and_mul(gate_up)
    assert torch.equal(gate_up, torch.ones(2, 8))


@pytest.mark.parametrize("bias", [False, True])
def test_linear(seed: int, bias: bool) -> None:
    x, weight = random(seed, 5, 24), random(seed + 1, 7, 24)
    offset = random(seed + 2, 7) if bias else None
    expected = x.double().numpy() @ weight.double().numpy().T + (0 if offset is None else offset.double().numpy())
    assert_near(linear(x, weight, offset), expected, relative=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [2, 6, 64])
def test_apply_rope_turns_pairs_as_complex_numbers(seed: int, head_size: int, dtype: torch.dtype) -> None:
    tokens, half = 11, head_size // 2
    wide = random(seed, tokens, 5, head_size, dtype=dtype)
    angles = 10 * random(seed + 1, tokens, half).double().numpy()
    cos = torch.from_numpy(np.concatenate([np.cos(angles)] * 2, -1)).to(dtype)
    sin = torch.from_numpy(np.concatenate([-np.sin(angles), np.sin(angles)], -1)).to(dtype)
    before = wide.double().numpy()
    pairs = (before[..., :half] + 1j * before[..., half:]) * np.exp(1j * angles)[:, None]
    expected = np.concatenate([pairs.real, pairs.imag], -1)
    # Only a slice of the heads is turned, as in the decoder.
    apply_rope_(wide[:, :3], cos, sin)
    assert_near(wide[:, :3], expected[:, :3], relative=4 * RELATIVE[dtype])
    assert torch.equal(wide[:, 3:].double(), torch.from_numpy(before[:, 3:]))
