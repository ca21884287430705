"""How long the stages of a pipeline stand idle, with prompts whole, in full chunks and in even steps.

Full chunks fill each step's token budget. Even steps share tokens out evenly, without a thought of attention (``even
tokens``) or with it (``even steps``: what ``even_chunks`` does).

The real scheduler and engine drive stages in virtual time (``pipeline/virtual_stages.py``): nothing is computed and
nothing sleeps, so the same command prints the same figures. Requests are those of Azure's conversation trace, all at
once (saturation) and at a share of what full chunks then answer. Costs are a dense 8B model's, each stage on one A100:
see ``COST``. Beside the stages' bubbles stands (P-1)/(P-1+M) for the M steps that were on their way on average.

    python -P benchmarks/bench_pipeline.py --json benchmarks/results/pipeline.json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slipstream.benchmarks.pipeline.conversations import SAMPLE, Conversation, read_conversations
from slipstream.benchmarks.pipeline.run import Figures, Run
from slipstream.benchmarks.pipeline.virtual_stages import StepCost
from slipstream.benchmarks.report import write_report
from slipstream.placement.model_facts import ModelFacts
from slipstream.runtime.config import SchedulerConfig

MODEL = ModelFacts(
    num_layers=32,
    hidden_size=4096,
    vocab_size=128_256,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    parameters=8_030_261_248,
    active_parameters=7_504_924_672,
    windows=(None,) * 32,
)
"""The sizes of Llama 3 8B."""
DTYPE_BYTES = 2
FLOPS_PER_S = 0.6 * 312e12
BYTES_PER_S = 0.8 * 2.0e12
"""An A100's, at shares of its peaks that engines reach."""
COST = StepCost(
    token_s=2 * MODEL.active_parameters / FLOPS_PER_S,
    read_s=MODEL.step_read_bytes(DTYPE_BYTES) / BYTES_PER_S,
    attention_ratio=MODEL.attention_ratio(),
    kv_position_s=MODEL.kv_bytes_per_token(DTYPE_BYTES) / BYTES_PER_S,
    overhead_s=0.5e-3,
)
PLANNING_S = 0.3e-3
BLOCK_SIZE = 16
MAX_SEQUENCES = 256
CACHE_TOKENS_A_STAGE = 240_000
MODERATE = 0.6
"""The moderate load's share of what full chunks answer at saturation."""
SARATHI_FEWER_BUBBLES = 6.29
"""Published: GPT-3 with pipeline parallelism; SARATHI (arXiv 2308.16369), abstract."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A way to cut prompts. ``attention_ratio``: what the scheduler is told, not what steps take."""

    name: str
    max_tokens: int
    even: bool
    attention_ratio: float = 0.0


def arms(longest: int, budgets: list[int]) -> Iterator[Arm]:
    """Return the ways that are compared, whole prompts first."""
    yield Arm(name="whole prompts", max_tokens=longest, even=False)
    for budget in budgets:
        yield Arm(name=f"full chunks, {budget}", max_tokens=budget, even=False)
        yield Arm(name=f"even tokens, {budget}", max_tokens=budget, even=True)
        ratio = MODEL.attention_ratio()
        yield Arm(name=f"even steps, {budget}", max_tokens=budget, even=True, attention_ratio=ratio)


def run_arm(arm: Arm, conversations: list[Conversation], stages: int, rate: float | None, stretch: int) -> Figures:
    """Run one way at one load."""
    longest = max(asked.prompt_tokens + asked.output_tokens for asked in conversations)
    config = SchedulerConfig(
        max_model_len=longest,
        num_blocks=max(CACHE_TOKENS_A_STAGE * stages * stretch, longest) // BLOCK_SIZE + 1,
        block_size=BLOCK_SIZE,
        max_num_seqs=min(MAX_SEQUENCES, arm.max_tokens),
        max_num_batched_tokens=arm.max_tokens,
        max_queued_requests=len(conversations),
        enable_prefix_caching=False,
        micro_batches=stages,
        even_chunks=arm.even,
        attention_ratio=arm.attention_ratio,
    )
    return Run(conversations, config, COST, stages=stages, planning_s=PLANNING_S, rate=rate).figures()


HEADER = (
    f"{'P':>2}  {'load':10}  {'arm':18}{'bubble':>8}{'(P-1)/(P-1+M)':>15}{'M':>6}{'fewer':>7}{'requests/s':>12}"
    f"{'tokens/s':>10}{'gap P50':>9}{'P99 ms':>8}{'first P50':>11}{'P99 ms':>9}  each stage"
)


def line(stages: int, load: str, arm: Arm, found: Figures, whole: Figures) -> str:
    """Return a line of the table; ``fewer``: how many times the bubbles of whole prompts are."""
    each = " ".join(f"{bubble:.1%}" for bubble in found.bubbles)
    return (
        f"{stages:>2}  {load:10}  {arm.name:18}{found.bubble:8.1%}{found.formula:15.1%}{found.in_flight:6.2f}"
        f"{whole.bubble / found.bubble:7.2f}{found.requests_per_s:12.2f}{found.output_tokens_per_s:10.0f}"
        f"{found.gap_p50_ms:9.1f}{found.gap_p99_ms:8.1f}{found.first_p50_ms:11.0f}{found.first_p99_ms:9.0f}  {each}"
    )


def main() -> None:
    """Run every arm at both loads, print the table and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--budgets", type=int, nargs="+", default=[2048, 512], help="token budgets of a step")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument(
        "--trace", type=Path, default=SAMPLE, help="the sample's columns, or the whole trace as published"
    )
    parser.add_argument("--stretch", type=int, default=1, help="make prompts and cache so many times longer")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    conversations = read_conversations(options.trace, at_most=options.requests, stretch=options.stretch)
    longest = max(asked.prompt_tokens + asked.output_tokens for asked in conversations)
    points: list[dict[str, Any]] = []
    print(HEADER)
    for stages in options.stages:
        rate: float | None = None
        for load in ("saturated", "moderate"):
            whole: Figures | None = None
            answered = 0.0
            for arm in arms(longest, options.budgets):
                found = run_arm(arm, conversations, stages, rate, options.stretch)
                whole = whole or found
                answered = answered or (found.requests_per_s if arm.name.startswith("full") else 0.0)
                print(line(stages, load, arm, found, whole), flush=True)
                points.append({"stages": stages, "load": load, "arm": asdict(arm), **asdict(found)})
            rate = MODERATE * answered
    print(f"published for chunks of prompts on GPT-3: {SARATHI_FEWER_BUBBLES} times fewer bubbles (SARATHI)")
    if options.json:
        write_report(options.json, "pipeline", {"requests": len(conversations), "points": points})


if __name__ == "__main__":
    main()
