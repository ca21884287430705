"""Rows of KV gathered for a transfer and scattered: as they are, and as numbers of another type."""

from __future__ import annotations

import pytest
import torch

from slipstream.kernels import backends
from slipstream.kernels.kv_pack import (
    gather_rows,
    gather_rows_reference,
    scatter_rows,
    scatter_rows_reference_,
)

FLOAT8 = torch.float8_e4m3fn
TYPES = [torch.float32, torch.bfloat16, torch.float16, FLOAT8]
NEAREST = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11, FLOAT8: 2**-4}
"""How far the nearest number of a type is at most, as a part of a number."""

ALL, NEW = 9, 7.0


def drawn(rows: int, row: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return (torch.randn(rows, row) * 100).to(dtype)


def fitting(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.clamp(-448, 448) if dtype == FLOAT8 else values


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize("row", [16, 5, 2100])
@pytest.mark.parametrize("packed", TYPES)
@pytest.mark.parametrize("kept", TYPES)
def test_every_type_goes_to_every_type(
    kept: torch.dtype, packed: torch.dtype, row: int, seed: int, launches: list[str]
) -> None:
    rows, index = drawn(ALL, row, kept, seed), torch.tensor([5, 0, 3])
    out, expected = torch.empty(3, row, dtype=packed), torch.empty(3, row, dtype=packed)
    gather_rows(rows, index, out)
    gather_rows_reference(rows, index, expected)
    assert same(out, expected)
    target = torch.full((ALL, row), NEW).to(kept)
    there = target.clone()
    scatter_rows(target, index, out)
    scatter_rows_reference_(there, index, expected)
    assert same(target, there)
    untouched = [1, 2, 4, 6, 7, 8]
    assert (target[untouched].float() == NEW).all()
    # Between other types torch converts.
    by_kernel = kept == packed or {kept, packed} == {torch.bfloat16, FLOAT8}
    assert launches == (["_move_rows_kernel"] * 2 if by_kernel else [])


@pytest.mark.parametrize("packed", TYPES)
@pytest.mark.parametrize("kept", TYPES)
def test_reference_takes_rows_and_the_nearest_numbers(kept: torch.dtype, packed: torch.dtype, seed: int) -> None:
    rows, index = drawn(ALL, 6, kept, seed), torch.tensor([8, 2])
    out = torch.empty(2, 6, dtype=packed)
    gather_rows_reference(rows, index, out)
    values = torch.stack([rows[8].float(), rows[2].float()])
    torch.testing.assert_close(out.float(), fitting(values, packed), rtol=NEAREST[packed], atol=2**-10)
    back = torch.zeros(ALL, 6, dtype=kept)
    scatter_rows_reference_(back, index, out)
    found = back.float()
    torch.testing.assert_close(found[[8, 2]], fitting(out.float(), kept), rtol=NEAREST[kept], atol=2**-10)
    assert not found[[0, 1, 3, 4, 5, 6, 7]].any()


def test_what_was_rounded_once_goes_there_and_back(seed: int) -> None:
    """Float8's numbers are bfloat16's too: a cache of either type has them."""
    numbers = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float().nan_to_num(0).to(FLOAT8).view(16, 16)
    index, wide, again = torch.randperm(16), torch.empty(16, 16, dtype=torch.bfloat16), torch.empty_like(numbers)
    scatter_rows(wide, index, numbers)
    gather_rows(wide, index, again)
    torch.testing.assert_close(again.float(), numbers.float(), rtol=0, atol=0)


def test_every_float8_is_rounded_as_torch_does(seed: int) -> None:
    """On its numbers, at the ties between two of them, and at random."""
    numbers = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float().nan_to_num(0).sort().values
    ties = (numbers[1:] + numbers[:-1]) / 2
    torch.manual_seed(seed)
    random = torch.randn(2048) * 10.0 ** torch.randint(-6, 4, (2048,))
    values = torch.cat((numbers, ties, random, torch.tensor([float("nan"), 1e9, -1e9, 0.0, -0.0])))
    rows = values.bfloat16().view(1, -1)
    values, out = rows.float(), torch.empty(rows.shape, dtype=FLOAT8)
    gather_rows(rows, torch.tensor([0]), out)
    clamped = torch.where(values.isnan(), values, values.clamp(-448, 448)).to(FLOAT8)
    torch.testing.assert_close(out.float(), clamped.float(), rtol=0, atol=0, equal_nan=True)
    are_numbers = ~clamped.float().isnan()
    assert torch.equal(out.float().signbit()[are_numbers], clamped.float().signbit()[are_numbers])


@pytest.mark.parametrize(("dtype", "row"), [(torch.int64, 4), (torch.int64, 3), (torch.uint8, 5), (torch.uint8, 32)])
@pytest.mark.parametrize("some", [0, 1, 5])
def test_rows_are_gathered_and_scattered(
    dtype: torch.dtype, row: int, some: int, seed: int, launches: list[str]
) -> None:
    torch.manual_seed(seed)
    rows, index = torch.randint(0, 100, (ALL, row)).to(dtype), torch.randperm(ALL)[:some]
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


def test_rows_that_are_not_aligned_are_moved(seed: int, launches: list[str]) -> None:
    """Words begin where they like in a buffer of bytes; converted numbers too."""
    rows = drawn(ALL, 16, torch.bfloat16, seed)
    index, out = torch.tensor([4, 8]), torch.empty(2 * 16 + 1, dtype=FLOAT8)[1:].view(2, 16)
    same_type = torch.empty(2 * 16 + 1, dtype=torch.bfloat16)[1:].view(2, 16)
    gather_rows(rows, index, same_type)
    assert same(same_type, rows[[4, 8]])
    gather_rows(rows, index, out)
    assert same(out, rows[[4, 8]].float().clamp(-448, 448).to(FLOAT8))
    assert launches == ["_move_rows_kernel"] * 2
