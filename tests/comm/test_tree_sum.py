"""A group that adds up subtrees: the bits of one rank, whichever operation, whatever carries it."""

from __future__ import annotations

import pytest
import torch

from slipstream.comm.collectives import Collectives
from slipstream.comm.errors import CommMisuse
from slipstream.comm.local_groups import local_group, run_ranks
from slipstream.comm.tree_sum import TreeGroup
from slipstream.kernels.tree_sum import LEAVES, add_pairs_reference

TIMEOUT_S = 30.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 8])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_add_up_as_one_does(ranks: int, tokens: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    leaves = torch.randn((LEAVES, tokens, 33), generator=generator)
    expected = add_pairs_reference(leaves, dtype)
    own = LEAVES // ranks

    def run(group: Collectives) -> None:
        tree = TreeGroup(group, dtype)
        subtree = add_pairs_reference(leaves[group.rank * own : (group.rank + 1) * own], torch.float32)
        work = tree.all_reduce(subtree)
        assert torch.equal(work.wait(TIMEOUT_S), expected)
        assert work.done()
        assert work.wait() is work.wait()
        if tokens % ranks == 0:
            share = tokens // ranks
            mine = tree.reduce_scatter(subtree).wait(TIMEOUT_S)
            assert torch.equal(mine, expected[group.rank * share : (group.rank + 1) * share])

    run_ranks(local_group(ranks), run)


def test_what_is_no_sum_goes_through() -> None:
    def run(group: Collectives) -> None:
        tree = TreeGroup(group, torch.bfloat16)
        assert (tree.name, tree.rank, tree.size) == (group.name, group.rank, 2)
        x = torch.full((1, 2), float(group.rank))
        assert tree.all_gather(x).wait(TIMEOUT_S).tolist() == [[0.0, 0.0], [1.0, 1.0]]
        both = torch.tensor([0.0, 1.0]) + 10 * group.rank
        came = tree.all_to_all(both, send_counts=[1, 1], receive_counts=[1, 1]).wait(TIMEOUT_S)
        assert came.tolist() == [float(group.rank), 10.0 + group.rank]
        assert tree.broadcast(x, root=1).wait(TIMEOUT_S).tolist() == [[1.0, 1.0]]
        if group.rank:
            tree.send(x, to=0).wait(TIMEOUT_S)
        else:
            assert tree.receive(torch.zeros(1, 2), source=1).wait(TIMEOUT_S).tolist() == [[1.0, 1.0]]
        tree.barrier(TIMEOUT_S)

    run_ranks(local_group(2), run)


def test_what_is_refused() -> None:
    (group,) = local_group(1)
    tree = TreeGroup(group, torch.bfloat16)
    with pytest.raises(CommMisuse, match=r"takes rows of float32 to add, got sum of torch\.bfloat16"):
        tree.all_reduce(torch.zeros(2, 2, dtype=torch.bfloat16))
    with pytest.raises(CommMisuse, match=r"got max of torch\.float32"):
        tree.all_reduce(torch.zeros(2, 2), op="max")
    pair = TreeGroup(local_group(2)[0], torch.bfloat16)
    with pytest.raises(CommMisuse, match="3 rows do not divide by 2 ranks"):
        pair.reduce_scatter(torch.zeros(3, 2))
    tree.close()
