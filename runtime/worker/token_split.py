"""Whether, and where, a step's tokens are cut in two so that one part computes while the other is on the wire.

Measured once, when a rank is ready, together with the other ranks: all have the same figures, so all cut at the same
token. From how many tokens on it is done at all is tried, not only computed: where the wire is fast, or moving bytes
takes the processors that compute, nothing is cut.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...comm.collectives import Collectives
from ...comm.overlap_cost import Curve, PassCost
from ...comm.overlap_measure import agree, fewest_that_gain, measure_collective
from ...comm.overlap_meter import OverlapMeter
from ...comm.overlap_split import choose_cut
from ..clock import monotonic_clock, processor_clock

_SIZES = (16, 64, 256, 1024)
_REPEATS = 3


class TokenSplit:
    """The choice of a cut, and a meter of what was hidden. One thread uses it.

    ``fewest``: the tokens from which on cutting was found to pay; None: never.
    """

    def __init__(self, cost: PassCost, *, element_bytes: int, fewest: int | None = 0) -> None:
        self.cost = cost
        self.fewest = fewest
        self.meter = OverlapMeter(
            monotonic_clock, wire_s=lambda result: cost.collective_s(result.numel() * element_bytes)
        )
        self._cuts: dict[int, int | None] = {}

    def cut(self, tokens: int) -> int | None:
        """Return how many tokens the first part of a step has; None where the whole is as fast."""
        if self.fewest is None or tokens < self.fewest:
            return None
        if tokens not in self._cuts:
            self._cuts[tokens] = choose_cut(self.cost, tokens)
        return self._cuts[tokens]


def measure_split(
    group: Collectives,
    run: Callable[[int, int | None, OverlapMeter], None],
    *,
    collectives: int,
    bytes_per_token: int,
    element_bytes: int,
    most_tokens: int,
    device: torch.device,
    also: Collectives | None = None,
) -> TokenSplit:
    """Measure passes and collectives of some sizes; every rank of the group, and of ``also``, which pass through the
    same layers, calls it at the same time.

    ``run`` makes a pass over so many tokens, cut after some of them or not at all, and notes its times in the meter.
    """
    sizes = sorted({min(size, most_tokens) for size in _SIZES})
    compute_s = Curve.rising((float(size), _compute_s(run, size)) for size in sizes)
    before_s, before_work_s = monotonic_clock(), processor_clock()
    nbytes = [size * bytes_per_token for size in sizes]
    collective_s = measure_collective(group, group.all_reduce, nbytes, clock=monotonic_clock, device=device, also=also)
    work = (processor_clock() - before_work_s) / max(monotonic_clock() - before_s, 1e-9)
    cost = PassCost(
        compute_s=agree(group, compute_s, device=device, also=also),
        collective_s=collective_s,
        collectives=collectives,
        bytes_per_token=bytes_per_token,
        # Where a GPU moves the bytes, the processor's time is not what computing takes.
        wire_work=agree(group, Curve((1.0,), (min(work, 1.0),)), device=device, also=also)(1.0)
        if device.type == "cpu"
        else 0.0,
    )
    fewest = fewest_that_gain(
        group,
        lambda tokens, cut: run(tokens, cut, _no_meter()),
        sizes,
        lambda tokens: choose_cut(cost, tokens),
        clock=monotonic_clock,
        device=device,
        also=also,
        repeats=_REPEATS,
    )
    return TokenSplit(cost, element_bytes=element_bytes, fewest=fewest)


def _compute_s(run: Callable[[int, int | None, OverlapMeter], None], tokens: int) -> float:
    """Return the seconds that a pass computes, the least of some."""
    times = []
    for _ in range(_REPEATS + 1):
        meter = _no_meter()
        run(tokens, None, meter)
        times.append(meter.totals.compute_s)
    return min(times[1:])


def _no_meter() -> OverlapMeter:
    """Return a meter that does not know how long works take."""
    return OverlapMeter(monotonic_clock, wire_s=lambda _: 0.0)
