"""Reduction in the order of ranks: the order, the one rounding, and nothing that depends on the size."""

from __future__ import annotations

import pytest
import torch

from slipstream.comm.rank_order import reduce_in_rank_order


def test_ranks_are_added_from_the_first_on() -> None:
    # In float32, one lost beside a hundred million is lost for good; added to its opposite first it is not.
    small, large, opposite = torch.tensor([1.0]), torch.tensor([1e8]), torch.tensor([-1e8])
    assert reduce_in_rank_order([small, large, opposite], "sum", torch.empty(1)).item() == 0.0
    assert reduce_in_rank_order([large, opposite, small], "sum", torch.empty(1)).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_round_once(dtype: torch.dtype, seed: int) -> None:
    parts = list(torch.randn(5, 1000, generator=torch.Generator().manual_seed(seed)).to(dtype))
    wanted = sum(part.float() for part in parts)
    assert isinstance(wanted, torch.Tensor)
    assert reduce_in_rank_order(parts, "sum", torch.empty_like(parts[0])).equal(wanted.to(dtype))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("op", ["sum", "max"])
def test_into_any_of_the_parts_and_at_any_size(ranks: int, op: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for length in (0, 1, 16384, 16385, 50_000):
        parts = list(torch.randn(ranks, length, generator=generator))
        wanted = parts[0].clone()
        for part in parts[1:]:
            wanted = wanted + part if op == "sum" else torch.maximum(wanted, part)
        for own in range(ranks):
            into = [part.clone() for part in parts]
            result = reduce_in_rank_order(into, op, into[own])
            assert result is into[own] and result.equal(wanted)
            assert all(other.equal(part) for other, part in zip(into, parts, strict=True) if other is not result)
