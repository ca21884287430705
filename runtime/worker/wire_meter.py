"""What a rank's passes spend on the wire where no step is cut: a meter that knows about how long a sum takes.

Waits are exact. Only what is complete before it is waited for, as a ladder's sums mostly are, has to be estimated;
where there is no such thing, nothing is measured for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...comm.collectives import Collectives
from ...comm.overlap_measure import measure_collective
from ...comm.overlap_meter import OverlapMeter
from ..clock import monotonic_clock

_SIZES = (1, 64, 256)
_REPEATS = 3


def wire_meter(
    group: Collectives, *, bytes_per_token: int, estimates: bool, also: Collectives | None = None
) -> OverlapMeter:
    """Return a meter for works of ``group``, on CPUs.

    With ``estimates``, for passes that begin works early, sums are measured: every rank of the group, and of ``also``,
    which pass through the same layers, calls it at the same time.
    """
    if not estimates:
        return OverlapMeter(monotonic_clock, wire_s=lambda _: 0.0)
    sum_s = measure_collective(
        group,
        group.all_reduce,
        [tokens * bytes_per_token for tokens in _SIZES],
        clock=monotonic_clock,
        device=torch.device("cpu"),
        also=also,
        repeats=_REPEATS,
    )

    def expected_s(result: Tensor) -> float:
        return sum_s(result.numel() * result.element_size())

    return OverlapMeter(monotonic_clock, wire_s=expected_s)
