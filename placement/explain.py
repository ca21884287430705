"""A ranking of plans in words: a table, why the first is first, whether splitting pays, and a chart.

Owns the wording. Everything in it comes from the plans' figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .objectives import Goal, Objectives
from .pareto_chart import chart
from .plan import Degrees, PoolPlan
from .plan_figures import SPLIT_MUST_GAIN, Figures
from .question import RankedPlan, Ranking

SHOWN = 10
"""Plans that the table has."""

_MOST_REASONS = 5

_GOALS: dict[Goal, tuple[str, Callable[[Figures], str]]] = {
    Goal.THROUGHPUT: ("tokens a second", lambda f: f"{f.tokens_per_s:,.0f}"),
    Goal.COST: ("cost of a million tokens", lambda f: f"{f.cost_per_million_tokens:.3g}"),
    Goal.POWER: ("joules a token", lambda f: f"{f.joules_per_token:.3g}"),
    Goal.TIME_TO_FIRST_TOKEN: ("seconds to the first token", lambda f: f"{f.first_token_s:.3g}"),
    Goal.TIME_PER_TOKEN: ("seconds a token", lambda f: f"{f.per_token_s:.3g}"),
}


def report(ranking: Ranking, objectives: Objectives) -> str:
    """Return all that a person wants to know about a ranking."""
    if not ranking.plans:
        return "\n".join(["No plan can be placed.", *_reasons(ranking)])
    lines = [*_table(ranking.plans[:SHOWN]), ""]
    lines += [f"{place}. {sentence(plan, objectives)}" for place, plan in enumerate(ranking.plans[:SHOWN], 1)]
    lines += ["", f"Why the first: {why_first(ranking, objectives)}", verdict(ranking, objectives)]
    first = ranking.plans[0].figures
    if first.misses:
        lines.append(f"No plan keeps every bound; the first comes nearest: {'; '.join(first.misses)}.")
    lines += ["", *chart([plan.figures for plan in ranking.plans], named=SHOWN)]
    return "\n".join(lines)


def structure(plan: RankedPlan) -> str:
    """Return a plan's pools in a few words: ``prefill 2 x tp=4 + decode 1 x tp=8``."""
    return " + ".join(f"{pool.name} {len(pool.replicas)} x {cut(pool.degrees)}" for pool in plan.pools if pool.replicas)


def cut(degrees: Degrees) -> str:
    """Return degrees without those that are 1."""
    axes = [f"{axis}={getattr(degrees, axis)}" for axis in ("tp", "pp", "ep") if getattr(degrees, axis) > 1]
    if degrees.experts_over_tp:
        axes.append("experts over tp")
    return " ".join(axes) or "tp=1"


def sentence(plan: RankedPlan, objectives: Objectives) -> str:
    """Return what limits a plan, and the bounds that it misses."""
    figures = plan.figures
    misses = f" It misses bounds: {'; '.join(figures.misses)}." if figures.misses else ""
    return f"{structure(plan)}: limited by: {figures.limit}.{misses}"


def why_first(ranking: Ranking, objectives: Objectives) -> str:
    """Say by what the first plan is before the next one."""
    name, value = _GOALS[objectives.goal]
    first = ranking.plans[0]
    if len(ranking.plans) == 1:
        return f"it is the only one that can be placed; {name}: {value(first.figures)}."
    second = ranking.plans[1]
    ours, theirs = first.figures, second.figures
    if bool(ours.misses) != bool(theirs.misses):
        return f"it keeps every bound, which {structure(second)} does not ({'; '.join(theirs.misses)})."
    if ours.misses and ours.excess < theirs.excess:
        return (
            f"it misses the bounds by least, {ours.excess:.2f} times where {structure(second)} has {theirs.excess:.2f}."
        )
    ratio = ours.goal_value(objectives.goal) / theirs.goal_value(objectives.goal)
    gain = abs(ratio - 1)
    if gain >= 0.001:
        return f"{name} {value(ours)} against {value(theirs)} of {structure(second)} ({gain:.1%} apart)."
    if ours.cost_per_hour < theirs.cost_per_hour:
        return f"{name} {value(ours)} like {structure(second)}, for {ours.cost_per_hour:.2f} an hour instead of " + (
            f"{theirs.cost_per_hour:.2f}."
        )
    return f"{name} {value(ours)} like {structure(second)}, with lower latency or fewer devices."


def verdict(ranking: Ranking, objectives: Objectives) -> str:
    """Say plainly whether splitting prefill from decode pays."""
    name, value = _GOALS[objectives.goal]
    split = next((plan for plan in ranking.plans if plan.figures.split), None)
    mixed = next((plan for plan in ranking.plans if not plan.figures.split), None)
    if split is None or mixed is None:
        only = "mixed replicas" if split is None else "prefill and decode pools"
        return f"Whether a split pays was not compared: only {only} could be placed or were asked for."
    figures = f"{name} {value(split.figures)} split, {value(mixed.figures)} mixed"
    if ranking.plans[0].figures.split:
        bounds = " and keeps more of the bounds" if split.figures.excess < mixed.figures.excess else ""
        return f"Splitting prefill from decode pays{bounds}: {figures}."
    needed = f"(it has to gain {SPLIT_MUST_GAIN - 1:.0%} to be worth its parts)"
    return f"Splitting prefill from decode does not pay here {needed}: {figures}. Mixed replicas are planned."


def _table(plans: Sequence[RankedPlan]) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("", "pools", "devices", "first token", "per token", "requests/s", "tokens/s", "cost/h", "kW", "bounds")
    ]
    rows += [(str(place), structure(plan), *_figures(plan.figures)) for place, plan in enumerate(plans, 1)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column == 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _figures(figures: Figures) -> tuple[str, ...]:
    return (
        str(figures.devices),
        _seconds(figures.first_token_s),
        _seconds(figures.per_token_s),
        f"{figures.requests_per_s:.3g}",
        f"{figures.tokens_per_s:,.0f}",
        f"{figures.cost_per_hour:.2f}",
        f"{figures.power_w / 1000:.2f}",
        "kept" if not figures.misses else "missed",
    )


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _reasons(ranking: Ranking) -> list[str]:
    left = len(ranking.refused) - _MOST_REASONS
    more = [f"  and {left} more reasons"] if left > 0 else []
    return [f"  {reason}" for reason in ranking.refused[:_MOST_REASONS]] + more


def places(pool: PoolPlan) -> list[str]:
    """Return a line for each replica of a pool: its devices, node by node, in the order of ranks."""
    lines = []
    for index, replica in enumerate(pool.replicas):
        runs: list[tuple[str, list[int]]] = []
        for device in replica.devices:
            if not runs or runs[-1][0] != device.node:
                runs.append((device.node, []))
            runs[-1][1].append(device.index)
        where = ", ".join(f"{node}[{','.join(map(str, indices))}]" for node, indices in runs)
        lines.append(f"{pool.name}-{index}: {where}")
    return lines
