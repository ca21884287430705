"""What follows a row-parallel product: the sum over ranks, the residual addition and the norm.

Two ways, in the style of ``overlap``. Plain: every rank sums, adds and normalizes all tokens. Sharded: each rank
does so for its share of the tokens, and the normalized ones are gathered; the residual stays in shares, which no rank
needs whole. Both move the same bytes; the second has one more latency and a fraction of the additions and norms.

The bits are the same where groups add in the order of ranks wherever a row lies (``rank_order``: on CPUs, and for any
two ranks), because each row's norm is its own. NCCL's sums of more ranks are as near, but not the same.

Shapes: T tokens, H hidden size, S a rank's share of the tokens, filled up so that all are equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as functional
from torch import Tensor

from ..kernels.norm import add_rms_norm
from .collectives import Collectives
from .overlap import Parts, Steps
from .overlap_cost import Curve


@dataclass(frozen=True, slots=True, kw_only=True)
class NormCost:
    """What the two ways are made of; measured, or given.

    Units: all_reduce_s, reduce_scatter_s and all_gather_s, bytes of all tokens to seconds; norm_s, tokens to seconds
    """

    ranks: int
    bytes_per_token: float
    all_reduce_s: Curve
    reduce_scatter_s: Curve
    all_gather_s: Curve
    norm_s: Curve

    def sharding_wins(self, tokens: int, *, margin: float = 0.03) -> bool:
        """Return whether the sharded way is expected to be faster, by a ``margin`` of the plain way's time."""
        share = share_of(tokens, self.ranks)
        size = share * self.ranks * self.bytes_per_token
        plain_s = self.all_reduce_s(tokens * self.bytes_per_token) + self.norm_s(tokens)
        sharded_s = self.reduce_scatter_s(size) + self.norm_s(share) + self.all_gather_s(size)
        return sharded_s < plain_s * (1 - margin)


def share_of(tokens: int, ranks: int) -> int:
    """Return the tokens of a rank's share: the last shares may be filled up with rows that mean nothing."""
    return -(-tokens // ranks)


def own_share(group: Collectives, x_TH: Tensor) -> Tensor:
    """Return this rank's share of all tokens' rows, which every rank has.

    Shapes: x_TH [tokens, size]; returns [share, size], rows past the end zero
    """
    share = share_of(x_TH.shape[0], group.size)
    own_SH = x_TH[group.rank * share : (group.rank + 1) * share]
    return functional.pad(own_SH, (0, 0, 0, share - own_SH.shape[0]))


def reduce_add_norm(
    group: Collectives, partial_TH: Tensor, residual: Tensor, weight_H: Tensor, epsilon: float, *, sharded: bool
) -> Steps[tuple[Tensor, Tensor]]:
    """Sum ``partial`` over the ranks, add it to the residual and normalize; return (normalized, new residual).

    Overwrites ``partial``. With ``sharded``, the residual is this rank's share (``own_share``) before and after.

    Shapes: partial_TH [tokens, size] contiguous; residual [tokens, size], or [share, size] if ``sharded``; weight_H
    [size]; normalized [tokens, size]
    """
    if group.size == 1:
        return add_rms_norm(partial_TH, residual, weight_H, epsilon)
    if not sharded:
        summed_TH = yield group.all_reduce(partial_TH)
        return add_rms_norm(summed_TH, residual, weight_H, epsilon)
    summed_SH = yield from reduce_to_share(group, partial_TH)
    normed_SH, residual = add_rms_norm(summed_SH, residual, weight_H, epsilon)
    return (yield from gather_shares(group, normed_SH, partial_TH.shape[0])), residual


def reduce_to_share(group: Collectives, partial_TH: Tensor) -> Parts:
    """Sum over the ranks and return this rank's share of the tokens; overwrites ``partial``.

    Shapes: partial_TH [tokens, size] contiguous; returns [share, size], rows past the end zero
    """
    missing = -partial_TH.shape[0] % group.size
    filled_TH = functional.pad(partial_TH, (0, 0, 0, missing)) if missing else partial_TH
    return (yield group.reduce_scatter(filled_TH))


def gather_shares(group: Collectives, x_SH: Tensor, tokens: int) -> Parts:
    """Return all tokens' rows of which each rank has its share.

    Shapes: x_SH [share, size] contiguous; returns [tokens, size]
    """
    return (yield group.all_gather(x_SH))[:tokens]
