"""A rank that is asked for single steps, and how long they take.

Owns the loading of one rank without an engine, the repetitions, and what the process's memory grew to.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...comm.groups import ALONE
from ...kernels.cpu.linear_panels import takes_any_rows
from ...sdk.errors import ConfigError
from ..clock import Clock, monotonic_clock
from ..messages import StepPlan
from ..models.registry import read_model_spec
from ..worker.executor import ModelExecutor
from ..worker.launch import choose_device, model_directory
from ..worker.rank import RankSetup, build_rank
from .points import PlanWriter, StepPoint

_STEP_TIMEOUT_S = 600.0
_MOST_REPEATS = 10
_POINT_S = 0.15
"""Seconds that a point's repetitions of one round take together, unless a single one takes longer."""

ROUNDS = 5
"""Times that all points are gone through: a machine that is busy for a while spoils no point for good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOptions:
    """What is measured: a model as an engine would hold it, with a cache for so many positions."""

    model: str
    dtype: str = "auto"
    device: str = "auto"
    quantization: str = "none"
    num_threads: int | None = None
    block_size: int = 16
    positions: int = 16_384
    most_batch: int = 64


class MeasuredRank:
    """One loaded rank; ``close`` ends it."""

    def __init__(self, options: ProfileOptions, *, clock: Clock = monotonic_clock) -> None:
        """Load the model and fill its cache; steps are timed by ``clock``. Raises: ConfigError, CheckpointError"""
        self._clock = clock
        spec = read_model_spec(model_directory(options.model))
        device = choose_device(options.device)
        if options.positions < 64 or options.block_size < 1:
            raise ConfigError("positions", f"must be at least 64, got {options.positions}")
        self.dtype = spec.dtype or "float32" if options.dtype == "auto" else options.dtype
        self.longest = min(spec.max_model_len, options.positions)
        blocks = options.positions // options.block_size
        self.kv_bytes = (
            spec.facts().kv_bytes_per_token(getattr(torch, self.dtype).itemsize) * blocks * options.block_size
        )
        setup = RankSetup(
            model=str(model_directory(options.model)),
            tokenizer=options.model,
            dtype=self.dtype,
            device=str(device),
            quantization=options.quantization,
            deterministic=False,
            num_threads=options.num_threads,
            num_blocks=blocks,
            block_size=options.block_size,
            max_slots=options.most_batch,
            max_length=self.longest,
            eos_token_ids=spec.eos_token_ids,
        )
        # Formats with fewer bits are compiled where bfloat16 is.
        kind = getattr(torch, self.dtype) if options.quantization == "none" else torch.bfloat16
        self.rows_in_buckets = device.type == "cpu" and not takes_any_rows(kind)
        self._device = device
        self._executor: ModelExecutor = build_rank(setup, ALONE).executor
        self.loaded_bytes = process_bytes()
        self._plans = PlanWriter(block_size=options.block_size, num_blocks=blocks)
        try:
            for plan in self._plans.fill(self.longest - 1, chunk=512):
                self._run(plan)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the rank's thread."""
        self._executor.close()

    def seconds(self, point: StepPoint) -> float:
        """Return how long a step takes, the least of several after the first: what else runs only makes it longer."""
        self.once(point)
        took: list[float] = []
        while not took or (sum(took) < _POINT_S and len(took) < _MOST_REPEATS):
            took.append(self._run(self._plans.plan(point, first=False)))
        return min(took)

    def once(self, point: StepPoint) -> None:
        """Run a step once."""
        self._run(self._plans.plan(point, first=True))

    def _run(self, plan: StepPlan) -> float:
        start_s = self._clock()
        self._executor.submit(plan).result(timeout=_STEP_TIMEOUT_S)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock() - start_s


def measure_all(
    rank: MeasuredRank, points: Sequence[StepPoint], *, rounds: int = ROUNDS, report: Callable[[str], None]
) -> list[tuple[StepPoint, float]]:
    """Measure all points in turn, several times, and return the least of each."""
    least = dict.fromkeys(points, float("inf"))
    for turn in range(rounds):
        report(f"round {turn + 1} of {rounds} over {len(points)} steps")
        for point in points:
            least[point] = min(least[point], rank.seconds(point))
    return list(least.items())


def process_bytes() -> int:
    """Return the memory that this process has to itself: without files' pages, which the system may take back."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kibibytes, but on macOS.
    return peak if sys.platform == "darwin" else peak * 1024
