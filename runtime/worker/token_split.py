"""Whether, and where, a step's tokens are cut so that one part computes while another is on the wire.

Measured once, when a rank is ready, together with the other ranks: all have the same figures, so all cut at the same
token. From how many tokens on it is done at all is tried, not only computed: where the wire is fast, or moving bytes
takes the processors that compute, nothing is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...comm.collectives import Collectives
from ...comm.overlap_cost import Curve, PassCost
from ...comm.overlap_measure import Clocks, agree, measure_sums, ways_that_gain
from ...comm.overlap_meter import OverlapMeter
from ...comm.overlap_split import Cuts, choose_cuts, cuts_worth_trying
from ..clock import monotonic_clock, processor_clock

_SIZES = (16, 64, 256, 1024)
_REPEATS = 3


class TokenSplit:
    """The choice of a cut, and a meter of what was hidden. One thread uses it.

    ``pieces``: from how many tokens on into how many parts cutting was found to pay; nothing is cut below.
    """

    def __init__(self, cost: PassCost, *, element_bytes: int, pieces: Sequence[tuple[int, int]] = ((0, 2),)) -> None:
        self.cost = cost
        self.pieces = pieces
        self.meter = OverlapMeter(
            monotonic_clock, wire_s=lambda result: cost.collective_s(result.numel() * element_bytes)
        )
        self._cuts: dict[int, Cuts | None] = {}

    def cut(self, tokens: int) -> Cuts | None:
        """Return after how many tokens a step is cut; None where the whole is as fast."""
        if tokens not in self._cuts:
            pieces = [count for fewest, count in self.pieces if fewest <= tokens]
            self._cuts[tokens] = choose_cuts(self.cost, tokens, pieces=pieces[-1]) if pieces else None
        return self._cuts[tokens]


def measure_split(
    group: Collectives,
    run: Callable[[int, Cuts | None, OverlapMeter], None],
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

    ``run`` makes a pass over so many tokens, cut at some of them or not at all, and notes its times in the meter.
    """
    sizes = sorted({min(size, most_tokens) for size in _SIZES})
    compute_s = Curve.rising((float(size), _compute_s(run, size)) for size in sizes)
    nbytes = [size * bytes_per_token for size in sizes]
    clocks = Clocks(wall=monotonic_clock, work=processor_clock)
    collective_s, wire_work = measure_sums(group, nbytes, clocks=clocks, device=device, also=also)
    cost = PassCost(
        compute_s=agree(group, compute_s, device=device, also=also),
        collective_s=collective_s,
        collectives=collectives,
        bytes_per_token=bytes_per_token,
        wire_work=wire_work,
    )
    found = ways_that_gain(
        group,
        lambda tokens, cuts: run(tokens, cuts, _no_meter()),
        sizes,
        lambda tokens: cuts_worth_trying(cost, tokens),
        clock=monotonic_clock,
        device=device,
        also=also,
        repeats=_REPEATS,
    )
    pieces = [(tokens, len(cuts) + 1) for tokens, cuts in found]
    return TokenSplit(cost, element_bytes=element_bytes, pieces=pieces)


def _compute_s(run: Callable[[int, Cuts | None, OverlapMeter], None], tokens: int) -> float:
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
