"""The process of the planner benchmark that measures: step times, or the peak of memory. Prints one line of JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from slipstream.runtime.clock import monotonic_clock, processor_clock
from slipstream.runtime.profiler.main import memory_traits
from slipstream.runtime.profiler.measure import MeasuredRank, ProfileOptions, measure_all, process_bytes
from slipstream.runtime.profiler.memory_watch import MemoryWatch, peak_of
from slipstream.runtime.profiler.points import StepPoint, table_points

TABLE_POSITIONS = 12_288
OTHER_POSITIONS = 5_120
LARGEST_CHUNK, LARGEST_BATCH = 1024, 16

UNSEEN = (
    *(StepPoint(tokens=tokens) for tokens in (12, 48, 96, 200, 384, 700)),
    *(StepPoint(tokens=tokens, context=context) for tokens, context in ((64, 500), (256, 700), (384, 2000))),
    *(StepPoint(batch=batch, context=128) for batch in (1, 3, 6, 12, 20, 40)),
    *(StepPoint(batch=batch, context=context) for batch, context in ((1, 2500), (3, 600), (6, 500), (12, 700))),
)
"""None of these is in the table of ``slipstream profile``."""


def times(request: dict[str, Any]) -> dict[str, Any]:
    """Measure the table and the unseen steps, in turn."""
    options = ProfileOptions(
        model=request["path"], dtype=request["dtype"], device="cpu", num_threads=request["threads"],
        positions=TABLE_POSITIONS,
    )  # fmt: skip
    rank = MeasuredRank(options, clock=processor_clock if request["processor_time"] else monotonic_clock)
    table = table_points(longest=rank.longest, positions=options.positions, most_batch=options.most_batch)
    try:
        found = dict(measure_all(rank, (*table, *UNSEEN), rounds=request["rounds"], report=lambda _: None))
        traits = memory_traits(options, rank, peak_of(rank, table))
    finally:
        rank.close()
    return {
        "dtype": rank.dtype,
        "rows_in_buckets": rank.rows_in_buckets,
        "traits": traits.model_dump(),
        "table": [{**asdict(point), "seconds": found[point]} for point in table],
        "unseen": [{**asdict(point), "seconds": found[point]} for point in UNSEEN],
    }


def memory(request: dict[str, Any]) -> dict[str, Any]:
    """Run the largest steps that some limits allow, with every block of the cache written."""
    options = ProfileOptions(
        model=request["path"], dtype=request["dtype"], device="cpu", num_threads=request["threads"],
        positions=OTHER_POSITIONS, most_batch=LARGEST_BATCH,
    )  # fmt: skip
    with MemoryWatch() as watch:
        rank = MeasuredRank(options)
        after = {"loaded": rank.loaded_bytes, "filled": watch.peak_bytes, "filled, then": process_bytes()}
        try:
            for point in (
                StepPoint(tokens=LARGEST_CHUNK),
                StepPoint(tokens=LARGEST_CHUNK, context=2048),
                StepPoint(batch=LARGEST_BATCH, context=200),
            ):
                rank.seconds(point)
                after[str(point)] = watch.peak_bytes
        finally:
            rank.close()
    return {
        "limits": {
            "max_num_batched_tokens": LARGEST_CHUNK, "max_num_seqs": LARGEST_BATCH, "max_model_len": rank.longest,
        },
        "kv_bytes": rank.kv_bytes,
        "peak_bytes": watch.peak_bytes,
        "after": after,
    }  # fmt: skip


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(times(asked) if asked["what"] == "times" else memory(asked)))
