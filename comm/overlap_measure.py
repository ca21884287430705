"""Measures at start-up what ``overlap_cost`` needs, such that every rank ends with the same figures.

Knows a group and a clock; what a pass computes is its caller's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .collectives import Collectives, Work
from .overlap_cost import Curve


def measure_curve(
    run: Callable[[int], None], sizes: Sequence[int], *, clock: Callable[[], float], repeats: int = 5
) -> Curve:
    """Return the median time of ``run(size)`` for each size, after one run that does not count."""
    points = []
    for size in sizes:
        run(size)
        times = []
        for _ in range(repeats):
            began_s = clock()
            run(size)
            times.append(clock() - began_s)
        points.append((float(size), statistics.median(times)))
    return Curve.rising(points)


def measure_collective(
    group: Collectives,
    start: Callable[[Tensor], Work],
    sizes: Sequence[int],
    *,
    clock: Callable[[], float],
    device: torch.device,
    repeats: int = 5,
) -> Curve:
    """Return the time of a collective for each size in bytes; every rank of the group calls it at the same time.

    ``start`` begins the collective on a tensor [float32 values] whose count divides by the group's size.
    """

    counts = {nbytes: max(nbytes // 4 // group.size, 1) * group.size for nbytes in sizes}
    tensors = {nbytes: torch.zeros(count, dtype=torch.float32, device=device) for nbytes, count in counts.items()}

    def run(nbytes: int) -> None:
        start(tensors[nbytes]).wait()

    group.barrier()
    return agree(group, measure_curve(run, sizes, clock=clock, repeats=repeats), device=device)


def agree(group: Collectives, curve: Curve, *, device: torch.device) -> Curve:
    """Return a curve with the slowest rank's times, the same bits on every rank; all call it with the same sizes."""
    seconds = torch.tensor(curve.seconds, dtype=torch.float64, device=device)
    slowest = group.all_reduce(seconds, op="max").wait()
    return Curve.rising(zip(curve.sizes, slowest.tolist(), strict=True))
