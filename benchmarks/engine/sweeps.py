"""Does cost grow as it should? The time of Slipstream's decode step against batch, context and model size.

Each sweep has the roof of the same step beside it, from rates measured in turn; a plot each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from slipstream.benchmarks.engine.measure import spread
from slipstream.benchmarks.engine.models import ensure_model
from slipstream.benchmarks.engine.plot import Line
from slipstream.benchmarks.engine.points import DECODE_PROMPT, M120, TINY, Format, Group, Shape, decode
from slipstream.benchmarks.engine.roof import roof_tokens_per_s
from slipstream.benchmarks.engine.rounds import Arena, PointResult

NAMES = ("batch", "context", "layers")
_OURS = "slipstream"
_NEW_TOKENS = 32
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_CONTEXTS = (128, 256, 512, 1_024, 2_048, 4_096)
_LAYERS = (2, 4, 8, 16, 24)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Groups that differ in one quantity; ``x`` reads it off a result. ``series`` names a result's line."""

    name: str
    x_label: str
    groups: list[Group]
    x: Callable[[PointResult], float]
    series: Callable[[PointResult], str]


def all_sweeps(*, quick: bool) -> list[Sweep]:
    """Return the sweeps; ``quick`` ones have two points on a tiny model."""
    base = TINY if quick else M120
    tokens = 4 if quick else _NEW_TOKENS
    formats = [Format.BF16] if quick else [Format.BF16, Format.FP32]
    batches = [decode(batch, 16 if quick else DECODE_PROMPT, tokens) for batch in (_BATCHES[:2] if quick else _BATCHES)]
    contexts = [
        decode(batch, context, tokens)
        for batch in ([1] if quick else [1, 8])
        for context in (_CONTEXTS[:2] if quick else _CONTEXTS)
    ]
    sizes = [
        replace(base, name=f"{base.name}-{layers}-layers", layers=layers)
        for layers in (_LAYERS[:2] if quick else _LAYERS)
    ]
    return [
        Sweep(
            name="batch",
            x_label=f"sequences of {batches[0].prompt_tokens} tokens",
            groups=[Group(shape=base, format=format_, points=batches) for format_ in formats],
            x=lambda result: result.point.batch,
            series=lambda result: str(result.group.format),
        ),
        Sweep(
            name="context",
            x_label="tokens of context",
            groups=[Group(shape=base, format=format_, points=contexts) for format_ in formats],
            x=lambda result: result.point.prompt_tokens,
            series=lambda result: f"{result.group.format}, batch {result.point.batch}",
        ),
        Sweep(
            name="layers",
            x_label="layers",
            groups=[Group(shape=size, format=format_, points=batches[:1]) for format_ in formats for size in sizes],
            x=lambda result: result.group.shape.layers,
            series=lambda result: str(result.group.format),
        ),
    ]


def shapes(sweeps: list[Sweep]) -> list[Shape]:
    """Return the models that sweeps need."""
    return list({group.shape.name: group.shape for sweep in sweeps for group in sweep.groups}.values())


def run_sweep(sweep: Sweep, arena: Arena, rounds: int) -> list[Line]:
    """Measure a sweep, print it and return its lines."""
    lines: dict[str, Line] = {}
    for group in sweep.groups:
        for result in arena.run_group(group, rounds):
            steps_ms = [run.step_ms for run in result.runs.get(_OURS, []) if run is not None]
            roofs = [roof_tokens_per_s(group.shape, group.format, result.point, rates) for rates in result.rates]
            line = lines.setdefault(sweep.series(result), Line(name=sweep.series(result)))
            line.x.append(sweep.x(result))
            line.step_ms.append(spread(steps_ms).median)
            line.roof_ms.append(result.point.batch / spread(roofs).median * 1e3)
    print(f"\n{sweep.name}: time of a step")
    print("  ".join(f"{cell:>16}" for cell in ("", sweep.x_label[:16], "step ms", "roof ms", "of roof")))
    for line in lines.values():
        for x, step_ms, roof_ms in zip(line.x, line.step_ms, line.roof_ms, strict=True):
            cells = (line.name, f"{x:g}", f"{step_ms:.2f}", f"{roof_ms:.2f}", f"{roof_ms / step_ms:.0%}")
            print("  ".join(f"{cell:>16}" for cell in cells), flush=True)
    return list(lines.values())


def make_models(sweeps: list[Sweep], folder: Path) -> dict[str, Path]:
    """Make the models that sweeps need and return their directories by name."""
    return {shape.name: ensure_model(shape, folder) for shape in shapes(sweeps)}
