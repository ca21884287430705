"""The sum over ranks with its norm: shares, the choice between the two ways, and what is measured for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from slipstream.comm.collectives import Collectives
from slipstream.comm.local_groups import local_group, run_ranks
from slipstream.comm.overlap import run_plain
from slipstream.comm.overlap_cost import Curve
from slipstream.comm.reduce_norm import NormCost, own_share, reduce_add_norm, share_of
from slipstream.kernels.norm import add_rms_norm

COST = NormCost(
    ranks=4,
    bytes_per_token=4096,
    all_reduce_s=Curve.line(fixed_s=1e-3, per_unit_s=2e-9),
    reduce_scatter_s=Curve.line(fixed_s=1e-3, per_unit_s=1e-9),
    all_gather_s=Curve.line(fixed_s=1e-3, per_unit_s=1e-9),
    norm_s=Curve.line(fixed_s=0.0, per_unit_s=2e-6),
)


@pytest.mark.parametrize("tokens", [1, 3, 4, 9])
@pytest.mark.parametrize("ranks", [2, 3])
def test_shares_hold_every_row_once(tokens: int, ranks: int) -> None:
    x_TH = torch.arange(1.0, tokens + 1)[:, None].expand(tokens, 2).contiguous()
    shares = [own_share(group, x_TH) for group in local_group(ranks)]
    assert {share.shape[0] for share in shares} == {share_of(tokens, ranks)}
    together = torch.cat(shares)
    assert torch.equal(together[:tokens], x_TH)
    assert not together[tokens:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 8])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_both_ways_give_the_same_bits_and_the_right_ones(
    ranks: int, tokens: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    partials = [torch.randn((tokens, 64), generator=generator).to(dtype) for _ in range(ranks)]
    residual_TH = torch.randn((tokens, 64), generator=generator).to(dtype)
    weight_H = torch.randn(64, generator=generator).to(dtype)

    def run(group: Collectives) -> None:
        partial_TH = partials[group.rank]
        sharded_TH, own_SH = run_plain(
            reduce_add_norm(group, partial_TH.clone(), own_share(group, residual_TH), weight_H, 1e-6, sharded=True)
        )
        plain_TH, new_TH = run_plain(
            reduce_add_norm(group, partial_TH.clone(), residual_TH, weight_H, 1e-6, sharded=False)
        )
        assert torch.equal(sharded_TH, plain_TH)
        first = group.rank * own_SH.shape[0]
        own_TH = new_TH[first : first + own_SH.shape[0]]
        assert torch.equal(own_SH[: own_TH.shape[0]], own_TH)
        expected_TH, _ = add_rms_norm(torch.stack(partials).double().sum(0).to(dtype), residual_TH, weight_H, 1e-6)
        torch.testing.assert_close(plain_TH, expected_TH)

    run_ranks(local_group(ranks), run)


def test_one_rank_needs_nobody(seed: int) -> None:
    x_TH = torch.randn((3, 8), generator=torch.Generator().manual_seed(seed))
    (alone,) = local_group(1)
    steps = reduce_add_norm(alone, x_TH, x_TH, torch.ones(8), 1e-6, sharded=False)
    with pytest.raises(StopIteration) as ended:
        next(steps)
    assert torch.equal(ended.value.value[1], 2 * x_TH)


def test_shares_win_where_the_norms_outweigh_a_latency() -> None:
    # Multiples of the ranks: no share is filled up.
    sizes = range(4, 4000, 4)
    wins = [tokens for tokens in sizes if COST.sharding_wins(tokens)]
    assert wins == list(range(wins[0], 4000, 4)), "from some number of tokens on"
    assert not COST.sharding_wins(100), "a latency more, for little"
    assert COST.sharding_wins(3999)
    assert not replace(COST, norm_s=Curve.line(fixed_s=0.0, per_unit_s=0.0)).sharding_wins(3999)
    slow = Curve.line(fixed_s=1e-3, per_unit_s=2e-9)
    assert not replace(COST, reduce_scatter_s=slow).sharding_wins(3999), "where it is an all-reduce in disguise"
