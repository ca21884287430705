"""From how many tokens on a step's residual is kept in shares, one on each tensor-parallel rank.

Measured once, when a rank is ready, together with the others: all have the same answer. What sums, norms and exchanges
take says where it could pay; there it is tried, and only where real passes gain is it done.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...comm.collectives import Collectives
from ...comm.overlap_cost import Curve
from ...comm.overlap_measure import agree, measure_collective, measure_curve, ways_that_gain
from ...comm.reduce_norm import NormCost
from ...kernels.norm import add_rms_norm
from ..clock import monotonic_clock

_SIZES = (64, 256, 1024)
_REPEATS = 3
_EPSILON = 1e-6


def fewest_in_shares(
    group: Collectives,
    run: Callable[[int, bool], None],
    *,
    hidden_size: int,
    dtype: torch.dtype,
    most_tokens: int,
    device: torch.device,
    also: Collectives | None = None,
) -> int | None:
    """Return the tokens from which on a pass is faster with its residual in shares of ``group``; None: never.

    ``run`` makes a pass over so many tokens, in shares or not. Every rank of the group, and of ``also``, which pass
    through the same layers, calls it at the same time.
    """
    sizes = sorted({min(size, most_tokens) for size in _SIZES})
    cost = _measure(group, sizes, hidden_size=hidden_size, dtype=dtype, device=device, also=also)
    found = ways_that_gain(
        group,
        lambda tokens, way: run(tokens, way is not None),
        sizes,
        lambda tokens: [True] if cost.sharding_wins(tokens) else [],
        clock=monotonic_clock,
        device=device,
        also=also,
        repeats=_REPEATS,
    )
    return found[0][0] if found else None


def _measure(
    group: Collectives,
    sizes: list[int],
    *,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    also: Collectives | None,
) -> NormCost:
    bytes_per_token = hidden_size * dtype.itemsize
    weight_H = torch.ones(hidden_size, dtype=dtype, device=device)

    def norm(tokens: int) -> None:
        x_TH = torch.zeros((tokens, hidden_size), dtype=dtype, device=device)
        add_rms_norm(x_TH, x_TH, weight_H, _EPSILON)

    # Shares as well: a norm's time is not even.
    norm_sizes = sorted({max(size // parts, 1) for size in sizes for parts in (1, group.size)})
    norm_s = measure_curve(norm, norm_sizes, clock=monotonic_clock, repeats=_REPEATS)
    nbytes = [size * bytes_per_token for size in sizes]
    all_reduce_s, reduce_scatter_s, gather_s = (
        measure_collective(group, start, sent, clock=monotonic_clock, device=device, also=also, repeats=_REPEATS)
        for start, sent in (
            (group.all_reduce, nbytes),
            (group.reduce_scatter, nbytes),
            # A rank gives its share of what is gathered.
            (group.all_gather, [size // group.size for size in nbytes]),
        )
    )
    return NormCost(
        ranks=group.size,
        bytes_per_token=bytes_per_token,
        all_reduce_s=all_reduce_s,
        reduce_scatter_s=reduce_scatter_s,
        all_gather_s=Curve(tuple(size * group.size for size in gather_s.sizes), gather_s.seconds),
        norm_s=agree(group, norm_s, device=device, also=also),
    )
