"""A chart in characters: plans by the time of a token and tokens a second, and which of them no other one beats.

Owns the drawing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .plan_figures import Figures

WIDTH, HEIGHT = 64, 12

_LEAST_SHARE = 0.1


def pareto(plans: Sequence[Figures]) -> tuple[int, ...]:
    """Return the plans that no other one beats in both tokens a second and the time of a token, by index."""
    front = []
    for index, own in enumerate(plans):
        beaten = any(
            other.tokens_per_s >= own.tokens_per_s
            and other.per_token_s <= own.per_token_s
            and (other.tokens_per_s > own.tokens_per_s or other.per_token_s < own.per_token_s)
            for other in plans
        )
        if not beaten:
            front.append(index)
    return tuple(front)


def chart(plans: Sequence[Figures], *, named: int) -> list[str]:
    """Return a chart's lines: plans by their place in the ranking up to ``named``, others as dots, the front marked.

    Both axes are logarithmic; up and left is better. What has less than a tenth of the most tokens is left out.
    """
    if not plans:
        return []
    most = max(plan.tokens_per_s for plan in plans)
    shown = [index for index, plan in enumerate(plans) if plan.tokens_per_s >= _LEAST_SHARE * most or index < named]
    named = sum(index < named for index in shown)
    plans = [plans[index] for index in shown]
    columns = _scale([plan.per_token_s for plan in plans], WIDTH)
    rows = _scale([plan.tokens_per_s for plan in plans], HEIGHT)
    grid = [[" "] * WIDTH for _ in range(HEIGHT)]
    front = set(pareto(plans))
    # Later plans first, so that better ones are on top where they meet.
    for index in range(len(plans) - 1, -1, -1):
        row, column = HEIGHT - 1 - rows[index], columns[index]
        grid[row][column] = str((index + 1) % 10) if index < named else "."
        if index in front and column + 1 < WIDTH and grid[row][column + 1] == " ":
            grid[row][column + 1] = "*"
    top, bottom = max(plan.tokens_per_s for plan in plans), min(plan.tokens_per_s for plan in plans)
    labels = {0: f"{top:,.0f}", HEIGHT - 1: f"{bottom:,.0f}"}
    margin = max(len(label) for label in labels.values())
    lines = [f"{'tokens/s'.rjust(margin)}   numbers are places in the list, * marks plans that none beats in both"]
    lines += [f"{labels.get(row, '').rjust(margin)} |{''.join(cells).rstrip()}" for row, cells in enumerate(grid)]
    left, right = min(plan.per_token_s for plan in plans), max(plan.per_token_s for plan in plans)
    lines.append(f"{' ' * margin} +{'-' * WIDTH}")
    ends = f"{left * 1000:.3g} ms".ljust(WIDTH - 12) + f"{right * 1000:.3g} ms a token"
    lines.append(f"{' ' * margin}  {ends}")
    return lines


def _scale(values: Sequence[float], cells: int) -> list[int]:
    """Return for each value the cell of a logarithmic axis from the least to the greatest."""
    low, high = math.log(min(values)), math.log(max(values))
    span = high - low
    return [0 if span == 0 else round((math.log(value) - low) / span * (cells - 1)) for value in values]
