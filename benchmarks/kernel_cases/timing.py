"""How long an operation takes: on a GPU between two events, replayed from a graph; on a CPU by the clock.

On a GPU the cache is swept before each run, so that bytes that have to be read are read; the sweep also keeps the GPU
busy while the host prepares the run, which would be measured otherwise. What cannot be captured is run as it is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from statistics import median

import torch

from .case import Run

_SWEEP_BYTES = 512 << 20
"""More than any GPU's cache."""


class Stopwatch:
    """Times runs on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sweep = torch.empty(_SWEEP_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def prepare(self, run: Run) -> Run:
        """Run once, so that everything is compiled, and return what is to be timed."""
        for _ in range(3):
            run()
        if self._device.type != "cuda":
            return run
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with suppress(RuntimeError):
            with torch.cuda.graph(graph):
                run()
            return graph.replay
        torch.cuda.synchronize()
        return run

    def once(self, run: Run) -> float:
        """Return the seconds of one run."""
        if self._sweep is None:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._sweep.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def interleaved(stopwatch: Stopwatch, runs: Mapping[str, Run], *, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each run in each round; in a round, each has its turn, in an order that turns too."""
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
            times[name].append(stopwatch.once(runs[name]))
    return times


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Return the median of the rounds' ratios."""
    return median(a / b for a, b in zip(over, under, strict=True))
