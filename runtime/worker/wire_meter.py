"""What a rank's passes spend on the wire where no step is cut: a meter that knows about how long a sum takes.

Waits are exact. Only what is complete before it is waited for, as a ladder's sums mostly are, has to be estimated;
where there is no such thing, nothing is measured for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...comm.collectives import Collectives, Work
from ...comm.overlap_measure import measure_collective
from ...comm.overlap_meter import OverlapMeter
from ..clock import monotonic_clock

_SIZES = (1, 64, 256)
_RING_SIZES = (64, 512, 4096)
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


def ring_meter(group: Collectives, *, bytes_per_token: int) -> OverlapMeter:
    """Return a meter for steps that are divided over ``group``, on CPUs: hops are begun early, so they are measured.

    Every rank of the group calls it at the same time. ``bytes_per_token``: of keys and values in one layer
    """

    def start(x: Tensor) -> Work:
        # As in a hop: to one neighbour, from the other.
        to, source = [0] * group.size, [0] * group.size
        to[(group.rank + 1) % group.size] = source[(group.rank - 1) % group.size] = x.shape[0]
        return group.all_to_all(x, send_counts=to, receive_counts=source)

    hop_s = measure_collective(
        group,
        start,
        [tokens * bytes_per_token for tokens in _RING_SIZES],
        clock=monotonic_clock,
        device=torch.device("cpu"),
        repeats=_REPEATS,
    )
    return OverlapMeter(monotonic_clock, wire_s=lambda received: hop_s(received.nbytes))
