"""The compiled kernels against torch's operations and float64, and a row's bits against its company."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from slipstream.kernels.activation import silu_and_mul
from slipstream.kernels.gate import Gate, GateKind
from slipstream.kernels.gated import gate_and_mul, gate_and_mul_reference
from slipstream.kernels.norm import add_rms_norm, rms_norm
from slipstream.kernels.rope_kv import kv_write_rows, rotate_and_write_
from slipstream.kernels.sample import draw_best
from slipstream.kernels.sample_settings import DrawSettings
from slipstream.tests.kernels.native_ways import compiled_or_skip, torch_alone

pytestmark = pytest.mark.usefixtures("compiled")

DTYPES = [torch.float32, torch.bfloat16]
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2}
SIZES = [1, 2, 7, 16, 31, 33, 64, 100, 768, 2049]


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within a unit or two of the type's last place."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    bound = BOUNDS[found.dtype]
    assert torch.allclose(found.double(), expected.double(), rtol=bound, atol=bound)


def libraries() -> dict[str, list[tuple[int, int]]]:
    """Return the files that this process has mapped, with their addresses."""
    found: dict[str, list[tuple[int, int]]] = {}
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith("/"):
            first, last = (int(end, 16) for end in fields[0].split("-"))
            found.setdefault(fields[5], []).append((first, last))
    return found


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_the_threads_are_torchs_own(seed: int) -> None:
    compiled = compiled_or_skip()
    address, mapped = compiled.parallel_address, libraries()
    (owner,) = (path for path, parts in mapped.items() if any(first <= address < last for first, last in parts))
    runtimes = {path for path in mapped if any(name in Path(path).name for name in ("gomp", "iomp", "libomp"))}
    assert runtimes == {owner}, "one OpenMP runtime in the process, and it is the one that torch computes on"
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = random(seed, 1024, 1024)
        x.exp()
        tasks = len(list(Path("/proc/self/task").iterdir()))
        assert compiled.team_size(2) == 2
        rms_norm(x, x[0], 1e-5)
        assert len(list(Path("/proc/self/task").iterdir())) == tasks, "no threads of its own"
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_norms(seed: int, size: int, dtype: torch.dtype) -> None:
    for rows in (0, 1, 2, 40):
        wide = random(seed, rows, size + 5, dtype=dtype)
        x, residual = random(seed + 1, rows, size, dtype=dtype), random(seed + 2, rows, size, dtype=dtype)
        weight = random(seed + 3, size, dtype=dtype)
        found = rms_norm(wide[:, :size], weight, 1e-5), *add_rms_norm(x, residual, weight, 1e-5)
        with torch_alone():
            expected = rms_norm(wide[:, :size], weight, 1e-5), *add_rms_norm(x, residual, weight, 1e-5)
        for one, other in zip(found, expected, strict=True):
            assert_near(one, other)
        assert torch.equal(found[2], expected[2]), "the residual is exactly the rounded sum"


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_heads(seed: int, dtype: torch.dtype) -> None:
    for heads, size in ((1, 64), (5, 128), (3, 20)):
        wide, weight = random(seed, 9, heads + 2, size, dtype=dtype), random(seed + 1, heads, size, dtype=dtype)
        found = rms_norm(wide[:, :heads], weight, 1e-6)
        shared = rms_norm(wide[:, :heads], weight[0], 1e-6)
        with torch_alone():
            assert_near(found, rms_norm(wide[:, :heads], weight, 1e-6))
            assert_near(shared, rms_norm(wide[:, :heads], weight[0], 1e-6))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_activation(seed: int, size: int, dtype: torch.dtype) -> None:
    for rows in (0, 1, 3, 50):
        x = random(seed, rows, 2 * size, dtype=dtype) * 20
        found = silu_and_mul(x)
        with torch_alone():
            assert_near(found, silu_and_mul(x))
        for row in range(rows):
            assert torch.equal(silu_and_mul(x[row : row + 1]), found[row : row + 1])


@pytest.mark.parametrize("gate", [Gate(kind=GateKind.GELU_TANH), Gate(kind=GateKind.CLAMPED, alpha=1.702, limit=7.0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_other_activations(seed: int, size: int, dtype: torch.dtype, gate: Gate) -> None:
    for rows in (0, 1, 3, 50):
        x = random(seed, rows, 2 * size, dtype=dtype) * 5
        found = gate_and_mul(x, gate)
        # In float64: torch's GELU adds one to a tanh that is nearly minus one, which leaves few digits in float32.
        assert_near(found, gate_and_mul_reference(x.double(), gate).to(dtype))
        for row in range(rows):
            assert torch.equal(gate_and_mul(x[row : row + 1], gate), found[row : row + 1])


@pytest.mark.parametrize("size", SIZES)
def test_norms_by_a_weight_of_float32(seed: int, size: int) -> None:
    """Rounded once: all numbers are within half a unit of the last place of what they are in float32."""
    x = random(seed, 5, size, dtype=torch.bfloat16)
    weight = random(seed + 1, size, dtype=torch.float32)
    found, total = add_rms_norm(x, x.flip(0).contiguous(), weight, 1e-5)
    with torch_alone():
        by_torch, _ = add_rms_norm(x, x.flip(0).contiguous(), weight, 1e-5)
    exact = rms_norm(total.float(), weight, 1e-5)
    for one in (found, by_torch):
        assert one.dtype == torch.bfloat16
        assert ((one.float() - exact).abs() <= 0.5001 * torch.finfo(torch.bfloat16).eps * exact.abs()).all()


def test_activation_of_more_axes(seed: int) -> None:
    x = torch.randn((3, 5, 14), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(silu_and_mul(x), silu_and_mul(x.view(15, 14)).view(3, 5, 7))


def test_what_does_not_fit_is_refused_and_not_read(seed: int) -> None:
    x = torch.randn((4, 32), generator=torch.Generator().manual_seed(seed))
    with pytest.raises(RuntimeError):
        add_rms_norm(x, x[:3], torch.ones(32), 1e-6)
    with pytest.raises(RuntimeError):
        rms_norm(x.view(4, 2, 16), torch.ones(3, 16), 1e-6)
    # A weight for all heads, and values that are not side by side, are served all the same.
    heads = x.view(4, 2, 16)
    assert_near(rms_norm(heads, torch.ones(1, 16), 1e-6), rms_norm(heads, torch.ones(2, 16), 1e-6))
    assert_near(rms_norm(x.t(), torch.ones(4), 1e-6), rms_norm(x.t().contiguous(), torch.ones(4), 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_large_small_or_none(dtype: torch.dtype) -> None:
    """What is not a number stays so: that is how a broken row is found out."""
    values = torch.tensor([0.0, -0.0, 88, -88, 200, -200, 3e38, -3e38, math.inf, 1e-30], dtype=dtype)
    ones = torch.ones_like(values)
    found = silu_and_mul(torch.stack((values, ones), 0).view(1, -1))
    assert_near(found[0, :8], torch.nn.functional.silu(values.double())[:8].to(dtype))
    assert found[0, 8] == math.inf
    broken = torch.full((1, 40), math.nan, dtype=dtype)
    assert silu_and_mul(broken).isnan().all()
    assert silu_and_mul(torch.full((1, 4), -math.inf, dtype=dtype)).isnan().all()
    for place in (0, 17, 39):
        x = torch.ones(1, 40, dtype=dtype)
        x[0, place] = math.nan
        assert rms_norm(x, x[0] * 0 + 1, 1e-5)[0].isnan().all()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_size"), [(4, 2, 64), (1, 1, 2), (3, 3, 20), (12, 4, 128)])
def test_rotating_and_writing(seed: int, heads: int, kv_heads: int, head_size: int, dtype: torch.dtype) -> None:
    blocks, block_size = 9, 4
    for tokens in (0, 1, 2, 30):
        qkv = random(seed, tokens, heads + 2 * kv_heads, head_size, dtype=dtype)
        angles = random(seed + 1, tokens, head_size, dtype=dtype)
        slots = torch.from_numpy(np.random.default_rng(seed).permutation(blocks * block_size)[:tokens])
        rows = kv_write_rows(slots, num_blocks=blocks, kv_heads=kv_heads, block_size=block_size)
        cache = random(seed + 2, 2, blocks, kv_heads, block_size, head_size, dtype=dtype)
        found, found_cache = qkv.clone(), cache.clone()
        rotate_and_write_(found, angles.cos(), angles.sin(), rows, found_cache, heads=heads)
        with torch_alone():
            rotate_and_write_(qkv, angles.cos(), angles.sin(), rows, cache, heads=heads)
        assert_near(found[:, :heads], qkv[:, :heads])
        assert_near(found_cache, cache)
        assert torch.equal(found_cache[1], cache[1]), "values, and what was not written, are the same bits"


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("size", [1, 15, 16, 100, 128, 4096])
def test_the_first_of_the_largest(seed: int, size: int) -> None:
    values = random(seed, 40, size + 3)[:, :size].round()  # many are equal
    values[1], values[2] = -math.inf, math.inf
    values[3, size // 2], values[4, -1], values[5] = math.nan, math.nan, math.nan
    values[6, size // 3 :] = 50
    off = np.zeros(40)
    integers = np.zeros(40, np.int64)
    greedy = DrawSettings(
        temperatures=off, top_ps=off + 1, top_ks=integers, min_ps=off, seeds=integers, positions=integers
    )
    scores, places = draw_best(values, greedy, first_id=0)
    expected = values.max(dim=-1)
    assert torch.equal(places, expected.indices)
    usable = expected.values.isfinite()
    assert torch.equal(scores[usable].float(), expected.values[usable])
    assert scores[3:6].isnan().all() and scores[2].isnan() and scores[1] == -math.inf
