"""What a step costs without a model: scheduler, block pool, plan and results, with an executor that answers at once.

Prints the median and P99 of a decode step (plan, null execution, results) against the number of running sequences,
the growth relative to linear, and the limit of 0.5 ms at 256 sequences; writes JSON with ``--json``.

    python -P -m slipstream.benchmarks.bench_scheduler --json benchmarks/results/scheduler.json
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from slipstream.benchmarks.report import write_report
from slipstream.runtime.config import SchedulerConfig
from slipstream.runtime.engine.engine import Engine
from slipstream.runtime.engine.scheduler import Scheduler
from slipstream.runtime.messages import EngineRequest
from slipstream.runtime.worker.null_executor import NullExecutor
from slipstream.sdk.params import SamplingParams

LIMIT_MS_AT_256 = 0.5
BLOCK_SIZE = 16
PROMPT_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Cost of a step at one number of running sequences, in milliseconds."""

    sequences: int
    ahead: bool
    median_ms: float
    p99_ms: float
    max_ms: float
    steps: int


def measure(sequences: int, *, steps: int, ahead: bool, seed: int) -> Point:
    """Run ``steps`` decode steps with ``sequences`` running and return what one costs."""
    generator = np.random.default_rng(seed)
    length = PROMPT_TOKENS + steps + 64
    config = SchedulerConfig(
        max_model_len=length,
        num_blocks=sequences * (-(-length // BLOCK_SIZE) + 1),
        block_size=BLOCK_SIZE,
        max_num_seqs=sequences,
        max_num_batched_tokens=max(8192, sequences),
    )
    executor = NullExecutor(max_slots=sequences, vocab_size=32_000)
    engine = Engine(Scheduler(config), executor, clock=time.monotonic, ahead=ahead, step_timeout_s=10.0)
    for index in range(sequences):
        # Different prompt lengths, so that sequences do not all ask for a block at the same step.
        prompt = generator.integers(0, 32_000, size=PROMPT_TOKENS - index % BLOCK_SIZE, dtype=np.int32)
        engine.submit(
            EngineRequest(
                request_id=str(index),
                prompt_token_ids=prompt,
                params=SamplingParams(max_tokens=steps + 40),
                seed=index,
                stop_ids=(32_001,),
                max_tokens=steps + 40,
                arrival_time_s=0.0,
            )
        )
    while engine.scheduler.load.waiting:
        engine.step()
    engine.step()
    costs_s = np.empty(steps)
    gc.collect()
    for step in range(steps):
        start = time.perf_counter()
        outputs = engine.step()
        costs_s[step] = time.perf_counter() - start
        assert len(outputs.token_ids) == sequences, "a sequence was left out of a decode step"
    engine.close()
    median_s, p99_s, worst_s = np.percentile(costs_s, [50, 99, 100])
    return Point(
        sequences=sequences,
        ahead=ahead,
        median_ms=median_s * 1e3,
        p99_ms=p99_s * 1e3,
        max_ms=worst_s * 1e3,
        steps=steps,
    )


def main() -> None:
    """Measure, print the table and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16, 64, 256, 512, 1024])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    points = [
        measure(sequences, steps=arguments.steps, ahead=ahead, seed=arguments.seed)
        for sequences in arguments.sequences
        for ahead in (True, False)
    ]
    reference = next((point for point in points if point.sequences == 256 and point.ahead), None)
    columns = ("sequences", "ahead", "median ms", "P99 ms", "max ms", "us/sequence", "vs linear")
    print("  ".join(f"{name:>11}" for name in columns))
    for point in points:
        linear = "-"
        if reference is not None:
            linear = f"{point.median_ms / reference.median_ms / (point.sequences / 256):.2f}"
        figures = (f"{value:.3f}" for value in (point.median_ms, point.p99_ms, point.max_ms))
        each_us = f"{point.median_ms * 1e3 / point.sequences:.2f}"
        row = (f"{point.sequences}", f"{point.ahead}", *figures, each_us, linear)
        print("  ".join(f"{cell:>11}" for cell in row))
    if reference is not None:
        ratio = reference.median_ms / LIMIT_MS_AT_256
        print(f"at 256 sequences: {reference.median_ms:.3f} ms, {ratio:.2f} of the limit of {LIMIT_MS_AT_256} ms")
    if arguments.json:
        write_report(arguments.json, "scheduler", {"points": [asdict(point) for point in points]})


if __name__ == "__main__":
    main()
