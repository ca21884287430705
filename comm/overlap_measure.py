"""Measures at start-up what the choice of a cut needs, such that every rank ends with the same figures.

``measure_pass`` feeds the cost model, which says where to cut; ``ways_that_gain`` tries it, and says from how many
tokens on which way is the fastest. Knows a group and clocks; what a pass computes is its caller's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .collectives import Collectives, Work
from .overlap_cost import Curve, PassCost

WayT = TypeVar("WayT")

_BYTES = 4
"""Of a float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clocks:
    """Seconds of the world, and seconds that this process' threads have worked."""

    wall: Callable[[], float]
    work: Callable[[], float]


def measure_pass(
    group: Collectives,
    compute: Callable[[int], None],
    sizes: Sequence[int],
    *,
    collectives: int,
    bytes_per_token: int,
    clocks: Clocks,
    device: torch.device,
    repeats: int = 7,
) -> PassCost:
    """Measure what a pass costs at some numbers of tokens, for the choice of a cut; all ranks call it at once.

    ``compute`` runs a pass of so many tokens as one rank alone would: with nothing sent. Its last size should be the
    largest step there is, and half and a quarter of it among the others.
    """
    group.barrier()
    compute_s = measure_curve(compute, sizes, clock=clocks.wall, repeats=repeats)
    compute_s = agree(group, compute_s, device=device)
    nbytes = [size * bytes_per_token for size in sizes]
    collective_s, wire_work = measure_sums(group, nbytes, clocks=clocks, device=device, repeats=repeats)
    return PassCost(
        compute_s=compute_s,
        collective_s=collective_s,
        collectives=collectives,
        bytes_per_token=bytes_per_token,
        wire_work=wire_work,
    )


def measure_sums(
    group: Collectives,
    nbytes: Sequence[int],
    *,
    clocks: Clocks,
    device: torch.device,
    also: Collectives | None = None,
    repeats: int = 5,
) -> tuple[Curve, float]:
    """Return the time of a sum over the ranks for some sizes, and the share of it in which the processor is at work."""
    began_s, began_work_s = clocks.wall(), clocks.work()
    collective_s = measure_collective(
        group, group.all_reduce, nbytes, clock=clocks.wall, device=device, also=also, repeats=repeats
    )
    share = min((clocks.work() - began_work_s) / max(clocks.wall() - began_s, 1e-9), 1.0)
    if device.type != "cpu":
        # Such a device moves bytes by itself: what the host does meanwhile is not taken from anyone.
        share = 0.0
    return collective_s, agree(group, Curve((1.0,), (share,)), device=device, also=also)(1.0)


def ways_that_gain(
    group: Collectives,
    run: Callable[[int, WayT | None], None],
    sizes: Sequence[int],
    ways: Callable[[int], Sequence[WayT]],
    *,
    clock: Callable[[], float],
    device: torch.device,
    also: Collectives | None = None,
    repeats: int = 7,
    margin: float = 0.02,
) -> tuple[tuple[int, WayT], ...]:
    """Return from how many tokens on passes are best made which other way than plainly; the fewest tokens first.

    It ends above the largest of ``sizes`` at which no way was faster than the plain one by ``margin``.
    ``run(tokens, way)`` runs a pass for real, None is the plain way; ``ways`` says which others are worth trying. All
    ranks, of ``also`` too, call it at once, and the slowest rank's medians count.
    """
    found: list[tuple[int, WayT]] = []
    for tokens in sorted(sizes, reverse=True):
        others = list(ways(tokens))
        if not others:
            break
        tried: list[WayT | None] = [None, *others]
        times_s: list[list[float]] = [[] for _ in tried]
        for round_ in range(repeats + 1):
            for place in range(len(tried)):
                number = (round_ + place) % len(tried)
                group.barrier()
                began_s = clock()
                run(tokens, tried[number])
                times_s[number].append(clock() - began_s)
        # The first round does not count.
        medians_s = [statistics.median(times[1:]) for times in times_s]
        plain_s, *others_s = _slowest(group, medians_s, device=device, also=also)
        if min(others_s) > plain_s * (1 - margin):
            break
        found.append((tokens, others[others_s.index(min(others_s))]))
    return tuple(reversed(found))


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
    also: Collectives | None = None,
    repeats: int = 5,
) -> Curve:
    """Return the time of a collective for each size in bytes; every rank of the group, and of those groups with which
    it has to agree ``also``, calls it at the same time.

    ``start`` begins the collective on a tensor [float32 values] whose count divides by the group's size.
    """

    counts = {nbytes: max(nbytes // _BYTES // group.size, 1) * group.size for nbytes in sizes}
    tensors = {nbytes: torch.zeros(count, dtype=torch.float32, device=device) for nbytes, count in counts.items()}

    def run(nbytes: int) -> None:
        start(tensors[nbytes]).wait()

    group.barrier()
    return agree(group, measure_curve(run, sizes, clock=clock, repeats=repeats), device=device, also=also)


def agree(group: Collectives, curve: Curve, *, device: torch.device, also: Collectives | None = None) -> Curve:
    """Return a curve with the slowest rank's times, the same bits on every rank; all call it with the same sizes.

    ``also``: another axis of a mesh, along which ranks pass through the same layers.
    """
    return Curve.rising(zip(curve.sizes, _slowest(group, curve.seconds, device=device, also=also), strict=True))


def _slowest(
    group: Collectives, seconds: Sequence[float], *, device: torch.device, also: Collectives | None = None
) -> list[float]:
    slowest = group.all_reduce(torch.tensor(seconds, dtype=torch.float64, device=device), op="max").wait()
    if also is not None:
        slowest = also.all_reduce(slowest, op="max").wait()
    times_s: list[float] = slowest.tolist()
    return times_s
