"""Whether, and where, a step's tokens are cut in two so that one part computes while the other is on the wire.

Measured once, when a rank is ready, together with the other ranks: all have the same figures, so all cut at the same
token. Where the wire is fast, or moving bytes takes the processors that compute, nothing is cut.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...comm.collectives import Collectives
from ...comm.overlap_cost import Curve, PassCost
from ...comm.overlap_measure import agree, measure_collective
from ...comm.overlap_meter import OverlapMeter
from ...comm.overlap_split import choose_cut
from ..clock import monotonic_clock, processor_clock

_SIZES = (16, 64, 256, 1024)
_REPEATS = 3


class TokenSplit:
    """The choice of a cut, and a meter of what was hidden. One thread uses it."""

    def __init__(self, cost: PassCost, *, element_bytes: int) -> None:
        self.cost = cost
        self.meter = OverlapMeter(
            monotonic_clock, wire_s=lambda result: cost.collective_s(result.numel() * element_bytes)
        )
        self._cuts: dict[int, int | None] = {}

    def cut(self, tokens: int) -> int | None:
        """Return how many tokens the first part of a step has; None where the whole is as fast."""
        if tokens not in self._cuts:
            self._cuts[tokens] = choose_cut(self.cost, tokens)
        return self._cuts[tokens]


def measure_split(
    group: Collectives,
    run: Callable[[int, OverlapMeter], object],
    *,
    collectives: int,
    bytes_per_token: int,
    element_bytes: int,
    most_tokens: int,
    device: torch.device,
) -> TokenSplit:
    """Measure passes and collectives of some sizes; every rank of the group calls it at the same time.

    ``run`` makes a pass over so many tokens, waiting for each collective at once, and notes its times in the meter.
    """
    sizes = sorted({min(size, most_tokens) for size in _SIZES})
    compute_s = Curve.rising((float(size), _compute_s(run, size)) for size in sizes)
    before_s, before_work_s = monotonic_clock(), processor_clock()
    nbytes = [size * bytes_per_token for size in sizes]
    collective_s = measure_collective(group, group.all_reduce, nbytes, clock=monotonic_clock, device=device)
    work = (processor_clock() - before_work_s) / max(monotonic_clock() - before_s, 1e-9)
    cost = PassCost(
        compute_s=agree(group, compute_s, device=device),
        collective_s=collective_s,
        collectives=collectives,
        bytes_per_token=bytes_per_token,
        # Where a GPU moves the bytes, the processor's time is not what computing takes.
        wire_work=agree(group, Curve((1.0,), (min(work, 1.0),)), device=device)(1.0) if device.type == "cpu" else 0.0,
    )
    return TokenSplit(cost, element_bytes=element_bytes)


def _compute_s(run: Callable[[int, OverlapMeter], object], tokens: int) -> float:
    """Return the seconds that a pass computes, the least of some."""
    times = []
    for _ in range(_REPEATS + 1):
        meter = OverlapMeter(monotonic_clock, wire_s=_no_time)
        run(tokens, meter)
        times.append(meter.totals.compute_s)
    return min(times[1:])


def _no_time(_: Tensor) -> float:
    return 0.0
