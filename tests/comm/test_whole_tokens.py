"""Tokens all of whose experts are on one rank come back as one row, with the bits of the sum at home."""

from __future__ import annotations

import pytest
import torch

from slipstream.comm.collectives import Collectives
from slipstream.comm.expert_hop import ENTRY_BYTES, HEADER
from slipstream.comm.expert_map import even_map
from slipstream.comm.experts import mix
from slipstream.comm.overlap import run_plain
from slipstream.comm.whole_tokens import choice_bytes
from slipstream.tests.fakes.expert_ranks import HIDDEN, LocalLevels, Tokens, all_tokens, make_experts

EXPERTS, TOP_K = 8, 3


def tokens_of(seed: int, whole: int, apart: int) -> Tokens:
    """Return tokens that choose experts 4 to 6, which one of two ranks has, and tokens that also choose expert 0."""
    draw = torch.Generator().manual_seed(seed)
    chosen = [[6, 4, 5]] * whole + [[4, 0, 6]] * apart
    count = whole + apart
    return Tokens(
        torch.randn((count, HIDDEN), generator=draw),
        torch.rand((count, TOP_K), generator=draw),
        torch.tensor(chosen, dtype=torch.int64).view(count, TOP_K),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("whole", "apart"), [(5, 0), (0, 4), (3, 2), (0, 0)])
def test_one_row_comes_back_for_a_whole_token(whole: int, apart: int, dtype: torch.dtype, seed: int) -> None:
    experts, placed, groups = make_experts(seed, EXPERTS, dtype=dtype), even_map(EXPERTS, ranks=2), LocalLevels((2,))
    made = [tokens_of(seed, whole, apart), tokens_of(seed + 1, 2, 1)]
    tokens = [Tokens(one.x.to(dtype), one.weights, one.experts) for one in made]

    def body(rank: int, levels: list[Collectives]) -> torch.Tensor:
        mine, products = tokens[rank], experts.of_rank(placed, rank)
        return run_plain(mix(levels, mine.x, mine.weights, mine.experts, placed=placed, products=products)).output_TH

    found = torch.cat(groups.run(body))
    together = all_tokens(tokens)
    assert torch.equal(found, experts.on_one_rank(together.x, together.weights, together.experts))
    row_bytes = HIDDEN * dtype.itemsize
    # From rank 0 to rank 1: its tokens, with their choices, and what rank 1's token asked of expert 0.
    there = (whole + apart) * (row_bytes + choice_bytes(TOP_K)) + (whole + 2 * apart) * ENTRY_BYTES
    assert groups.sent(0)[0, 1] == HEADER * 8 + there + row_bytes
    # And back: a row for each whole token, two for each other; beside rank 1's own token.
    back = (whole + 2 * apart) * row_bytes
    assert groups.sent(0)[1, 0] == HEADER * 8 + back + row_bytes + choice_bytes(TOP_K) + ENTRY_BYTES


def test_one_choice_needs_no_more_than_the_row() -> None:
    assert choice_bytes(1) == 0
    assert choice_bytes(8) == 64
