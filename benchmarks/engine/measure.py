"""Rates from the moments at which tokens came, the same for every contender, and medians over rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slipstream.benchmarks.engine.points import Kind, Point


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a point by one contender. Rates are tokens per second.

    - ``rate`` of a decode point: batch over the mean time between tokens of the sequence that began last, from its
      first token until the first of all sequences has ended: steps of full batches only, without prefill.
      ``rate`` of a prefill point: prompt tokens over the time until the last sequence has its first token.
    - ``end_to_end``: new tokens over the time from handing over the prompts to the last token.
    - ``step_ms``: time of a decode step, batch over ``rate``; NaN for prefill points.
    """

    rate: float
    end_to_end: float
    step_ms: float


def evaluate(point: Point, events: Sequence[Sequence[Any]]) -> Run:
    """Turn ``[seconds, sequence, new tokens]``, in order of time, into rates.

    Raises: ValueError when sequences or tokens are missing, or too many.
    """
    counts = dict.fromkeys(range(point.batch), 0)
    first_s: dict[int, float] = {}
    last_s: dict[int, float] = {}
    for at_s, sequence, tokens in events:
        if sequence not in counts:
            raise ValueError(f"{point.name}: an event of sequence {sequence}, of {point.batch}")
        counts[sequence] += tokens
        first_s.setdefault(sequence, at_s)
        last_s[sequence] = at_s
    if wrong := {sequence: count for sequence, count in counts.items() if count != point.new_tokens}:
        raise ValueError(f"{point.name}: new tokens by sequence are {wrong}, not {point.new_tokens}")
    end_to_end = point.batch * point.new_tokens / max(last_s.values())
    begin_s, end_s = max(first_s.values()), min(last_s.values())
    if point.kind is Kind.PREFILL:
        return Run(rate=point.batch * point.prompt_tokens / begin_s, end_to_end=end_to_end, step_ms=math.nan)
    latest = max(first_s, key=first_s.__getitem__)
    full = [(at_s, tokens) for at_s, sequence, tokens in events if sequence == latest and begin_s < at_s <= end_s]
    # A contender that gives the first sequences all their tokens before the last one begins has no full batch at all.
    rate = math.nan
    if full:
        rate = point.batch * sum(tokens for _, tokens in full) / (full[-1][0] - begin_s)
    return Run(rate=rate, end_to_end=end_to_end, step_ms=point.batch / rate * 1e3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Median, least and most over rounds."""

    median: float
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """Return median and range; NaN for no values, or if one of them is."""
    if not values or any(math.isnan(value) for value in values):
        return Spread(median=math.nan, least=math.nan, most=math.nan)
    return Spread(median=statistics.median(values), least=min(values), most=max(values))
