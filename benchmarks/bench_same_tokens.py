"""How often a request's tokens depend on how it was run: the rate of near-ties that rounding decides differently.

Runs the same prompts (pieces of Python's standard library) alone, in batches, in chunks and without the prefix cache,
and counts the requests whose tokens differ from those of the run alone, and the first differences per 1,000 tokens. The
limit is 0; floating-point sums whose order depends on the number of rows keep reduced precision from reaching it.

    python -P benchmarks/bench_same_tokens.py --json benchmarks/results/same_tokens.json
"""

from __future__ import annotations

import argparse
import inspect
import random
import shutil
import subprocess
import tempfile
import textwrap
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from slipstream import LLM, SamplingParams
from slipstream.benchmarks.report import write_report

DEMO_MODEL = Path(__file__).resolve().parents[1] / "examples" / "demo_model"
SOURCES = (argparse, inspect, shutil, subprocess, tempfile, textwrap, threading)
MODES: dict[str, tuple[int, dict[str, Any]]] = {
    "batch of 5": (5, {}),
    "batch of all": (1 << 20, {}),
    "chunks of 7": (1, {"long_prefill_token_threshold": 7}),
    "no prefix cache": (1, {"enable_prefix_caching": False}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Differences of one mode against each request alone."""

    dtype: str
    sampling: str
    mode: str
    requests: int
    differing: int
    differences_per_1000_tokens: float


def draw_prompts(count: int, seed: int) -> list[str]:
    """Return pieces of 20 to 300 characters of the sources, none ending in white space."""
    draw = random.Random(seed)
    sources = [inspect.getsource(module) for module in SOURCES]
    prompts = []
    for _ in range(count):
        source = draw.choice(sources)
        begin = draw.randrange(len(source) - 400)
        prompts.append(source[begin : begin + draw.randint(20, 300)].rstrip() or "import")
    return prompts


def run(
    model: str, dtype: str, prompts: list[str], params: SamplingParams, batch: int, options: dict[str, Any]
) -> list[list[int]]:
    """Return every prompt's tokens, generated ``batch`` at a time."""
    with LLM(model, dtype=dtype, max_model_len=256, max_num_seqs=64, **options) as llm:
        outputs = []
        for begin in range(0, len(prompts), batch):
            outputs += llm.generate(prompts[begin : begin + batch], params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]


def compare(alone: list[list[int]], other: list[list[int]]) -> tuple[int, float]:
    """Return how many requests differ, and first differences per 1,000 tokens that were alike until then."""
    differing, compared = 0, 0
    for expected, got in zip(alone, other, strict=True):
        alike = next((place for place, pair in enumerate(zip(expected, got, strict=True)) if pair[0] != pair[1]), None)
        differing += alike is not None
        compared += len(expected) if alike is None else alike + 1
    return differing, 1000 * differing / compared


def main() -> None:
    """Measure, print the table and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default=str(DEMO_MODEL))
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    prompts = draw_prompts(arguments.requests, arguments.seed)
    greedy = SamplingParams(temperature=0.0, max_tokens=arguments.tokens, ignore_eos=True)
    sampled = replace(greedy, temperature=0.8, top_p=0.9, seed=arguments.seed)
    points = []
    print(f"{'dtype':>10}  {'sampling':>8}  {'mode':>16}  {'differ':>8}  {'per 1,000 tokens':>16}  limit")
    for dtype in ("float32", "bfloat16"):
        for name, params in (("greedy", greedy), ("sampled", sampled)):
            alone = run(arguments.model, dtype, prompts, params, 1, {})
            for mode, (batch, options) in MODES.items():
                differing, rate = compare(alone, run(arguments.model, dtype, prompts, params, batch, options))
                points.append(
                    Point(
                        dtype=dtype,
                        sampling=name,
                        mode=mode,
                        requests=len(prompts),
                        differing=differing,
                        differences_per_1000_tokens=rate,
                    )
                )
                share = f"{differing}/{len(prompts)}"
                print(f"{dtype:>10}  {name:>8}  {mode:>16}  {share:>8}  {rate:>16.2f}  0", flush=True)
    if arguments.json:
        write_report(arguments.json, "same_tokens", {"points": [asdict(point) for point in points]})


if __name__ == "__main__":
    main()
