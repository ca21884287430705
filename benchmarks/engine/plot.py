"""Plots of the sweeps: the time of a step, and the roof as a dashed line. Needs matplotlib (``[bench]``)."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a plot: times of a step, in milliseconds, and their roofs."""

    name: str
    x: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    roof_ms: list[float] = field(default_factory=list)


def plot(lines: list[Line], *, title: str, x_label: str, path: Path) -> None:
    """Write one sweep as SVG, both axes logarithmic; without matplotlib say so and write nothing."""
    try:
        matplotlib = importlib.import_module("matplotlib")
        # No window: the figure goes to a file.
        matplotlib.use("agg")
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        print(f"no plot of {title}: matplotlib is not installed (the [bench] extra)")
        return
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for number, line in enumerate(lines):
        colour = f"C{number}"
        axes.plot(line.x, line.step_ms, color=colour, marker="o", label=line.name)
        axes.plot(line.x, line.roof_ms, color=colour, linestyle="--", label=f"{line.name}, roof")
    axes.set(title=title, xlabel=x_label, ylabel="time of a step, ms", xscale="log", yscale="log")
    ticks = sorted({x for line in lines for x in line.x})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
    print(f"wrote {path}")
