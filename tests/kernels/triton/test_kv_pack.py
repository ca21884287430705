"""KV gathered for a transfer and scattered: block lists, head ranges, types; rows of bytes."""

from __future__ import annotations

import pytest
import torch

from slipstream.kernels import backends
from slipstream.kernels.kv_pack import (
    gather_rows,
    pack_kv,
    pack_kv_reference,
    scatter_rows,
    unpack_kv_,
    unpack_kv_reference_,
)

FLOAT8 = torch.float8_e4m3fn
TYPES = [torch.float32, torch.bfloat16, torch.float16, FLOAT8]
BLOCKS, KV_HEADS = 6, 4


def caches(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(2, BLOCKS, KV_HEADS, *shape).to(dtype) for _ in range(2)]


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("packed_dtype", TYPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_goes_to_every_type(
    dtype: torch.dtype, packed_dtype: torch.dtype, seed: int, launches: list[str]
) -> None:
    layers, blocks_B, heads = caches((4, 8), dtype, seed), torch.tensor([5, 0, 3]), range(1, 3)
    factors = {"k_factor": 0.3, "v_factor": 2.5} if FLOAT8 in (dtype, packed_dtype) else {}
    packed = pack_kv(layers, blocks_B, heads, packed_dtype, **factors)
    assert same(packed, pack_kv_reference(layers, blocks_B, heads, packed_dtype, **factors))
    targets = [torch.full_like(layer, 7) for layer in layers]
    expected = [layer.clone() for layer in targets]
    unpack_kv_(packed, targets, blocks_B, heads, **factors)
    unpack_kv_reference_(packed, expected, blocks_B, heads, **factors)
    assert all(map(same, targets, expected))
    # Between other types torch converts.
    by_kernel = dtype == packed_dtype != FLOAT8 or {dtype, packed_dtype} == {torch.bfloat16, FLOAT8}
    assert launches == (["_move_rows_kernel"] * 2 if by_kernel else [])


@pytest.mark.parametrize("heads", [range(4), range(1), range(3, 4), range(2, 2)])
@pytest.mark.parametrize("shape", [(4, 8), (3, 5), (1, 1), (16, 80)])
def test_heads_are_moved_as_they_are(shape: tuple[int, int], heads: range, seed: int, launches: list[str]) -> None:
    layers, blocks_B = caches(shape, torch.bfloat16, seed), torch.tensor([4, 1])
    layers[0][0, 4].fill_(float("nan"))
    packed = pack_kv(layers, blocks_B, heads, torch.bfloat16)
    assert same(packed, pack_kv_reference(layers, blocks_B, heads, torch.bfloat16))
    targets = [torch.zeros_like(layer) for layer in layers]
    expected = [layer.clone() for layer in targets]
    unpack_kv_(packed, targets, blocks_B, heads)
    unpack_kv_reference_(packed, expected, blocks_B, heads)
    assert all(map(same, targets, expected))
    assert launches == (["_move_rows_kernel"] * 2 if len(heads) else [])


def test_reference_takes_keys_and_values_of_the_blocks(seed: int) -> None:
    layers = caches((3, 5), torch.float32, seed)
    packed = pack_kv_reference(layers, torch.tensor([5, 2]), range(1, 4), torch.float32, k_factor=2.0)
    assert torch.equal(packed[1, 0, 1], 2 * layers[1][0, 2, 1:4])
    assert torch.equal(packed[0, 1, 0], layers[0][1, 5, 1:4])


def test_every_float8_is_rounded_as_torch_does(seed: int) -> None:
    """On its numbers, at the ties between two of them, and at random."""
    numbers = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float().nan_to_num(0).sort().values
    ties = (numbers[1:] + numbers[:-1]) / 2
    torch.manual_seed(seed)
    random = torch.randn(2048) * 10.0 ** torch.randint(-6, 4, (2048,))
    values = torch.cat((numbers, ties, random, torch.tensor([float("nan"), 1e9, -1e9, 0.0, -0.0])))
    values = torch.cat((values, values.new_zeros(-len(values) % 16)))
    values = values.bfloat16().float()
    layers = [values.bfloat16().view(1, 1, 1, 1, -1).repeat(2, 1, 1, 1, 1)]
    packed = pack_kv(layers, torch.tensor([0]), range(1), FLOAT8)
    clamped = torch.where(values.isnan(), values, values.clamp(-448, 448)).to(FLOAT8)
    torch.testing.assert_close(packed[0, 0].flatten().float(), clamped.float(), rtol=0, atol=0, equal_nan=True)
    numbers = ~clamped.float().isnan()
    assert torch.equal(packed[0, 1].flatten().float().signbit()[numbers], clamped.float().signbit()[numbers])


@pytest.mark.parametrize(("dtype", "row"), [(torch.int64, 4), (torch.int64, 3), (torch.uint8, 5), (torch.uint8, 32)])
@pytest.mark.parametrize("some", [0, 1, 5])
def test_rows_are_gathered_and_scattered(
    dtype: torch.dtype, row: int, some: int, seed: int, launches: list[str]
) -> None:
    torch.manual_seed(seed)
    rows, index = torch.randint(0, 100, (9, row)).to(dtype), torch.randperm(9)[:some]
    out = torch.empty(some, row, dtype=dtype)
    gather_rows(rows, index, out)
    assert torch.equal(out, rows[index])
    target = torch.zeros_like(rows)
    scatter_rows(target, index, out)
    assert torch.equal(target[index], out) and target.sum() == out.sum()
    assert launches == (["_move_rows_kernel"] * 2 if some else [])
    backends.use("auto")
    gather_rows(target, index, out.zero_())
    assert torch.equal(out, rows[index])


def test_what_does_not_fit_is_refused(seed: int) -> None:
    layers, blocks_B = caches((2, 4), torch.float32, seed), torch.tensor([1])
    with pytest.raises(ValueError, match="no range of 4 KV heads"):
        pack_kv(layers, blocks_B, range(2, 5), torch.float32)
    with pytest.raises(ValueError, match="packed KV of this shape is needed"):
        unpack_kv_(torch.zeros(2, 2, 1, 2, 2, 4), layers, blocks_B, range(1))
