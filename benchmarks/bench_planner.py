"""How near the planner's figures come to what is measured: step times after a profile, and peak memory.

For each of three small models, made with random weights, a process measures the table of ``slipstream profile`` and,
in the same rounds, steps that calibration is not shown. Another process runs the largest step that an engine with other
limits may have, and says what its memory grew to. The limits: 15 % for times, 5 % for memory.

``--processor-time`` counts what one thread works instead of what passes, for a machine on which other things run.

    python -P benchmarks/bench_planner.py --out benchmarks/results/planner.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slipstream.benchmarks.planner.models import MODELS, ensure
from slipstream.benchmarks.report import write_report
from slipstream.placement.calibration import MeasuredStep, calibrate
from slipstream.placement.device_table import DEVICE_TABLE
from slipstream.placement.model_cut import Cut
from slipstream.placement.plan import Degrees
from slipstream.placement.plan_memory import EngineLimits, MemoryTraits, rank_memory
from slipstream.placement.replica_links import NO_LINKS
from slipstream.placement.step_cost import Efficiency, StepCost, filled_rows
from slipstream.runtime.cluster.model_sizes_file import read_model_sizes

TIME_LIMIT, MEMORY_LIMIT = 0.15, 0.05
PROCESS = "slipstream.benchmarks.planner.process"


def main() -> None:
    """Measure, predict, print, and exit with 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "slipstream-bench-planner")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.processor_time:
        given.threads = 1
    results = []
    for name in given.models:
        path = ensure(name, given.folder)
        times = measured("times", path, name, given)
        memory = measured("memory", path, name, given)
        results.append({"model": name, **judge_times(path, times), **judge_memory(path, times, memory)})
        show(results[-1])
    if given.out:
        write_report(given.out, "planner", {"limits": [TIME_LIMIT, MEMORY_LIMIT], "models": results})
    late = [each["model"] for each in results if each["worst_time"] > TIME_LIMIT or each["memory_off"] > MEMORY_LIMIT]
    print("all within limits" if not late else f"beyond limits: {', '.join(late)}")
    sys.exit(bool(late))


def measured(what: str, path: Path, name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Run a measurement in a process of its own, whose memory is its own."""
    request = {
        "what": what, "path": str(path), "dtype": MODELS[name].dtype, "threads": given.threads,
        "processor_time": given.processor_time, "rounds": given.rounds,
    }  # fmt: skip
    command = [sys.executable, "-P", "-m", PROCESS, json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"measuring {name} failed:\n{done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def judge_times(path: Path, times: dict[str, Any]) -> dict[str, Any]:
    """Return how far predicted times are from those of steps that calibration has not seen."""
    device = DEVICE_TABLE["cpu-core"]
    cut = Cut(model=read_model_sizes(path, dtype=times["dtype"]), degrees=Degrees())
    start = Efficiency(rows=filled_rows) if times["rows_in_buckets"] else Efficiency()
    found = calibrate([MeasuredStep(**row) for row in times["table"]], cut=cut, device=device, start=start)
    cost = StepCost(cut=cut, device=device, links=NO_LINKS, efficiency=found)
    rows = []
    for row in times["unseen"]:
        step = MeasuredStep(**row)
        rows.append({**row, "predicted_s": cost.stage(0, step.step).seconds})
    off = [abs(row["predicted_s"] / row["seconds"] - 1) for row in rows]
    return {"unseen": rows, "table": times["table"], "worst_time": max(off), "median_time": statistics.median(off)}


def judge_memory(path: Path, times: dict[str, Any], memory: dict[str, Any]) -> dict[str, Any]:
    """Return how far the predicted peak is from the measured one; what is not worked out comes from the profile."""
    sizes = read_model_sizes(path, dtype=times["dtype"])
    limits = EngineLimits(**memory["limits"])
    traits = MemoryTraits(**times["traits"])
    parts = rank_memory(Cut(model=sizes, degrees=Degrees()), limits, device_bytes=1 << 40, traits=traits)
    predicted = parts.without_kv + memory["kv_bytes"]
    return {
        "memory_parts": asdict(parts),
        "predicted_bytes": predicted,
        "peak_bytes": memory["peak_bytes"],
        "after": memory["after"],
        "memory_off": abs(predicted / memory["peak_bytes"] - 1),
    }


def show(result: dict[str, Any]) -> None:
    """Print one model's figures."""
    print(f"\n{result['model']}: steps that calibration has not seen")
    print(f"{'step':>40}  {'measured ms':>11}  {'predicted':>9}  {'off':>6}")
    for row in result["unseen"]:
        what = f"{row['batch']} decoding" if row["batch"] else f"{row['tokens']} of a prompt"
        off = row["predicted_s"] / row["seconds"] - 1
        print(
            f"{what + ' behind ' + str(row['context']):>40}  {row['seconds'] * 1e3:11.2f}  "
            f"{row['predicted_s'] * 1e3:9.2f}  {off:+6.1%}"
        )
    print(f"times: worst {result['worst_time']:.1%}, median {result['median_time']:.1%} (limit {TIME_LIMIT:.0%})")
    print(
        f"memory: predicted {result['predicted_bytes'] / 2**20:.0f} MiB, peak {result['peak_bytes'] / 2**20:.0f} MiB: "
        f"{result['memory_off']:.1%} off (limit {MEMORY_LIMIT:.0%})",
        flush=True,
    )


if __name__ == "__main__":
    main()
