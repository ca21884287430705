"""Measures at start-up what the choice of a cut needs, such that every rank ends with the same figures.

``measure_pass`` feeds the cost model, which says where to cut; ``pieces_worth_cutting`` tries it, and says into how
many parts, and from how many tokens on at all. Knows a group and clocks; what a pass computes is its caller's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .collectives import Collectives, Work
from .overlap_cost import Curve, PassCost
from .overlap_split import PIECES, Cuts

PiecesBySize: TypeAlias = tuple[tuple[int, int], ...]
"""(from so many tokens on, into so many parts), by tokens."""

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
    group: Collectives, nbytes: Sequence[int], *, clocks: Clocks, device: torch.device, repeats: int = 5
) -> tuple[Curve, float]:
    """Return the time of a sum over the ranks for some sizes, and the share of it in which the processor is at work."""
    began_s, began_work_s = clocks.wall(), clocks.work()
    collective_s = measure_collective(
        group, group.all_reduce, nbytes, clock=clocks.wall, device=device, repeats=repeats
    )
    share = min((clocks.work() - began_work_s) / max(clocks.wall() - began_s, 1e-9), 1.0)
    if device.type != "cpu":
        # Such a device moves bytes by itself: what the host does meanwhile is not taken from anyone.
        share = 0.0
    return collective_s, agree(group, Curve((1.0,), (share,)), device=device)(1.0)


def pieces_worth_cutting(
    group: Collectives,
    run: Callable[[int, Cuts | None], None],
    sizes: Sequence[int],
    choose: Callable[[int, int], Cuts | None],
    *,
    clock: Callable[[], float],
    device: torch.device,
    repeats: int = 7,
    margin: float = 0.02,
) -> PiecesBySize:
    """Return into how many parts steps are best cut: from so many tokens on, so many; the fewest tokens first.

    It ends above the largest of ``sizes`` at which no cut was faster than the whole by ``margin``.
    ``run(tokens, cuts)`` runs a pass for real, cut or whole; ``choose(tokens, pieces)`` says where. All ranks call it
    at once, and the slowest rank's medians count.
    """
    found: list[tuple[int, int]] = []
    for tokens in sorted(sizes, reverse=True):
        chosen = {pieces: cuts for pieces in PIECES if (cuts := choose(tokens, pieces)) is not None}
        if not chosen:
            break
        ways: list[Cuts | None] = [None, *chosen.values()]
        times_s: list[list[float]] = [[] for _ in ways]
        for round_ in range(repeats + 1):
            for place in range(len(ways)):
                way = (round_ + place) % len(ways)
                group.barrier()
                began_s = clock()
                run(tokens, ways[way])
                times_s[way].append(clock() - began_s)
        # The first round does not count.
        whole_s, *cut_s = _slowest(group, [statistics.median(times[1:]) for times in times_s], device=device)
        best_s, best = min(zip(cut_s, chosen, strict=True))
        if best_s > whole_s * (1 - margin):
            break
        found.append((tokens, best))
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
    repeats: int = 5,
) -> Curve:
    """Return the time of a collective for each size in bytes; every rank of the group calls it at the same time.

    ``start`` begins the collective on a tensor [float32 values] whose count divides by the group's size.
    """

    counts = {nbytes: max(nbytes // _BYTES // group.size, 1) * group.size for nbytes in sizes}
    tensors = {nbytes: torch.zeros(count, dtype=torch.float32, device=device) for nbytes, count in counts.items()}

    def run(nbytes: int) -> None:
        start(tensors[nbytes]).wait()

    group.barrier()
    return agree(group, measure_curve(run, sizes, clock=clock, repeats=repeats), device=device)


def agree(group: Collectives, curve: Curve, *, device: torch.device) -> Curve:
    """Return a curve with the slowest rank's times, the same bits on every rank; all call it with the same sizes."""
    return Curve.rising(zip(curve.sizes, _slowest(group, curve.seconds, device=device), strict=True))


def _slowest(group: Collectives, seconds: Sequence[float], *, device: torch.device) -> list[float]:
    own = torch.tensor(seconds, dtype=torch.float64, device=device)
    slowest: list[float] = group.all_reduce(own, op="max").wait().tolist()
    return slowest
