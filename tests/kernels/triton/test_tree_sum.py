"""Sums as trees: the kernel, compiled C and torch's operations give one result, bit for bit."""

from __future__ import annotations

import pytest
import torch

from slipstream.kernels import backends
from slipstream.kernels.tree_sum import add_pairs, add_pairs_reference, add_stacked, subtree_leaves
from slipstream.tests.kernels.native_ways import torch_alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(3, 70), (1,), (0, 5), (2, 3000)])
def test_every_way_gives_the_same_bits(
    shape: tuple[int, ...], parts: int, dtype: torch.dtype, seed: int, launches: list[str]
) -> None:
    torch.manual_seed(seed)
    parts_NX = torch.randn((parts, *shape)) * 10 ** torch.randint(-3, 4, (parts, *shape))
    expected = add_pairs_reference(parts_NX, dtype)
    assert torch.equal(add_stacked(parts_NX, dtype), expected)
    assert launches == (["_add_pairs_kernel"] if parts > 1 and parts_NX.numel() else [])
    backends.use("torch")
    assert torch.equal(add_stacked(parts_NX, dtype), expected)
    assert torch.equal(add_pairs([part.clone() for part in parts_NX], dtype), expected)
    with torch_alone():
        assert torch.equal(add_stacked(parts_NX, dtype), expected)
    torch.testing.assert_close(expected.double(), parts_NX.double().sum(0), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_rank_s_subtree_is_a_part_of_the_whole(ranks: int, seed: int) -> None:
    torch.manual_seed(seed)
    leaves = torch.randn((8, 1000))
    own = subtree_leaves(ranks)
    subtrees = [add_stacked(leaves[rank * own : (rank + 1) * own], torch.float32) for rank in range(ranks)]
    assert torch.equal(add_stacked(torch.stack(subtrees), torch.bfloat16), add_pairs_reference(leaves, torch.bfloat16))


def test_what_makes_no_tree() -> None:
    assert [subtree_leaves(ranks) for ranks in (1, 2, 3, 4, 5, 6, 8, 16)] == [8, 4, 0, 2, 0, 0, 1, 0]
    with pytest.raises(ValueError, match="parts: 1, 2, 4 or 8 of float32 make a tree, got 3"):
        add_stacked(torch.zeros(3, 2), torch.float32)
    with pytest.raises(ValueError, match=r"got 2 of torch\.bfloat16"):
        add_stacked(torch.zeros(2, 2, dtype=torch.bfloat16), torch.float32)
