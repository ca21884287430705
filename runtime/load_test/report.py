"""A load test's figures, for people as a table and for programs as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .plan import LoadPlan
from .statistics import QUANTILES, Distribution, LoadStatistics


def to_table(figures: LoadStatistics) -> RenderableType:
    """Return the figures as a table, with errors below it."""
    title = (
        f"{figures.completed} of {figures.requests} requests in {figures.duration_s:.2f} s:"
        f" {figures.requests_per_s:.2f} requests/s, {figures.output_tokens_per_s:.1f} output tokens/s"
    )
    table = Table()
    table.add_column("milliseconds")
    for name in ("mean", *(f"P{percent}" for percent in QUANTILES), "max"):
        table.add_column(name, justify="right")
    for name, measured in _distributions(figures).items():
        table.add_row(name.replace("_", " "), *_cells(measured))
    sizes = f"tokens: {figures.prompt_tokens} in prompts, {figures.output_tokens} in answers"
    if figures.uncounted:
        sizes += f" ({figures.uncounted} answers came without a count; their pieces were counted)"
    lines: list[RenderableType] = [Text(title), table, Text(sizes)]
    for kind, count in figures.errors.items():
        lines.append(Text(f"{count} failed: {kind}: {figures.details[kind]}", style="red"))
    return Group(*lines)


def to_json(figures: LoadStatistics, plan: LoadPlan, *, base_url: str, model: str) -> dict[str, Any]:
    """Return the figures and what was asked for as plain values."""
    return {"base_url": base_url, "model": model, "plan": asdict(plan), "figures": asdict(figures)}


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a report, making its folder if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _distributions(figures: LoadStatistics) -> dict[str, Distribution | None]:
    names = ("first_token", "between_tokens", "per_token", "end_to_end")
    return {name: getattr(figures, name) for name in names}


def _cells(measured: Distribution | None) -> list[str]:
    if measured is None:
        return ["-"] * (len(QUANTILES) + 2)
    values = (measured.mean_ms, *(measured.quantiles_ms[percent] for percent in QUANTILES), measured.max_ms)
    return [f"{value:.2f}" for value in values]
