"""Figures of a load test out of its records: pure arithmetic.

- time to first token: from when a request was due to its first text
- between tokens: from one piece of text to the next of the same stream; a server may put several tokens into one
- per token: a request's time after its first text, over its tokens but the first
- end to end: from when a request was due to its last byte

In an open loop a request is due when it arrives, sent or not: time that it waits for its turn is the server's doing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

QUANTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """What became of one request. Times are of one monotonic clock.

    ``output_tokens`` and ``prompt_tokens`` are the server's own count, None where it gave none. ``error`` is the kind
    of failure, None for a whole answer; ``detail`` is its message.
    """

    index: int
    due_s: float
    end_s: float
    pieces_s: tuple[float, ...] = ()
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None = None
    detail: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of the answer; the number of pieces where the server does not count."""
        return len(self.pieces_s) if self.output_tokens is None else self.output_tokens

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token, None before one came."""
        return self.pieces_s[0] - self.due_s if self.pieces_s else None

    @property
    def per_token_s(self) -> float | None:
        """Time after the first text, per token but the first; None where there is no second token."""
        if not self.pieces_s or self.tokens < 2:
            return None
        return (self.pieces_s[-1] - self.pieces_s[0]) / (self.tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Mean, extremes and quantiles of a set of durations, in milliseconds; ``quantiles_ms`` by percent."""

    count: int
    mean_ms: float
    max_ms: float
    quantiles_ms: dict[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadStatistics:
    """Figures of a whole load test. A distribution is None when nothing was measured for it."""

    requests: int
    completed: int
    errors: dict[str, int]
    details: dict[str, str]
    uncounted: int
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    first_token: Distribution | None
    between_tokens: Distribution | None
    per_token: Distribution | None
    end_to_end: Distribution | None


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return a percentile of values in ascending order, linear between the two nearest."""
    if not ordered:
        raise ValueError("there is no percentile of nothing")
    place = (len(ordered) - 1) * percent / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def distribution(durations_s: Iterable[float]) -> Distribution | None:
    """Return the distribution of durations, None when there are none."""
    ordered = sorted(duration * 1e3 for duration in durations_s)
    if not ordered:
        return None
    return Distribution(
        count=len(ordered),
        mean_ms=math.fsum(ordered) / len(ordered),
        max_ms=ordered[-1],
        quantiles_ms={percent: percentile(ordered, percent) for percent in QUANTILES},
    )


def summarize(records: Sequence[RequestRecord], *, start_s: float, end_s: float) -> LoadStatistics:
    """Return the figures of a load test that lasted from ``start_s`` to ``end_s``.

    Durations and throughput are those of whole answers; what failed is counted and nothing else.
    """
    whole = [record for record in records if record.error is None]
    duration_s = max(end_s - start_s, 1e-9)
    tokens = sum(record.tokens for record in whole)
    details: dict[str, str] = {}
    for record in records:
        if record.error is not None:
            details.setdefault(record.error, record.detail)
    return LoadStatistics(
        requests=len(records),
        completed=len(whole),
        errors=dict(Counter(record.error for record in records if record.error is not None).most_common()),
        details=details,
        uncounted=sum(record.output_tokens is None for record in whole),
        duration_s=duration_s,
        prompt_tokens=sum(record.prompt_tokens or 0 for record in whole),
        output_tokens=tokens,
        requests_per_s=len(whole) / duration_s,
        output_tokens_per_s=tokens / duration_s,
        first_token=distribution(record.ttft_s for record in whole if record.ttft_s is not None),
        between_tokens=distribution(
            later - earlier for record in whole for earlier, later in pairwise(record.pieces_s)
        ),
        per_token=distribution(record.per_token_s for record in whole if record.per_token_s is not None),
        end_to_end=distribution(record.end_s - record.due_s for record in whole),
    )
