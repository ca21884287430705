"""What clients will ask for: lengths of prompts and answers, and how many a second.

Values, and the arithmetic of distributions. Where the lengths come from (a trace, a file's figures) is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

MAX_SHAPES = 64
"""Kinds of requests that a plan is worked out for; a longer list is summed up."""

_P95 = NormalDist().inv_cdf(0.95)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestShape:
    """One kind of request, and its share of all requests."""

    prompt_tokens: int
    output_tokens: int
    share: float

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1 or not 0 < self.share <= 1:
            raise ValueError(f"a kind of request has at least one token each way and a share up to 1, got {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """All requests: their kinds, how many come, and how much of the prompts a prefix cache has already.

    ``requests_per_s`` None: as many as can be served. ``cached_share`` is a share of the prompt tokens.

    Raises: ValueError naming what cannot be
    """

    shapes: tuple[RequestShape, ...]
    requests_per_s: float | None = None
    cached_share: float = 0.0

    def __post_init__(self) -> None:
        if not self.shapes or not math.isclose(sum(shape.share for shape in self.shapes), 1.0, rel_tol=1e-6):
            raise ValueError("shares of the kinds of requests must add up to 1")
        if self.requests_per_s is not None and not 0 < self.requests_per_s < math.inf:
            raise ValueError(f"requests_per_s must be above 0, got {self.requests_per_s}")
        if not 0 <= self.cached_share < 1:
            raise ValueError(f"cached_share must be at least 0 and below 1, got {self.cached_share}")

    @property
    def mean_prompt(self) -> float:
        """Tokens of a prompt that have to be computed, on average."""
        return sum(shape.share * shape.prompt_tokens for shape in self.shapes) * (1 - self.cached_share)

    @property
    def mean_output(self) -> float:
        """Tokens of an answer, on average."""
        return sum(shape.share * shape.output_tokens for shape in self.shapes)

    @property
    def mean_context(self) -> float:
        """Positions that the cache holds of a running request, on average over all steps in which it draws a token."""
        weighted = sum(
            shape.share * shape.output_tokens * (shape.prompt_tokens + shape.output_tokens / 2) for shape in self.shapes
        )
        return weighted / self.mean_output

    @property
    def mean_position(self) -> float:
        """Positions before a prompt's token, on average over all tokens that are computed."""
        tokens = sum(shape.share * shape.prompt_tokens for shape in self.shapes)
        pairs = sum(shape.share * shape.prompt_tokens**2 for shape in self.shapes) * (1 - self.cached_share**2)
        return pairs / (2 * tokens * (1 - self.cached_share))

    @property
    def prompts(self) -> tuple[tuple[int, float], ...]:
        """Prompt lengths and their shares, each length once, ascending."""
        shares: dict[int, float] = {}
        for shape in self.shapes:
            shares[shape.prompt_tokens] = shares.get(shape.prompt_tokens, 0.0) + shape.share
        return tuple(sorted(shares.items()))

    @property
    def longest(self) -> int:
        """The most tokens, prompt and answer together, of any kind of request."""
        return max(shape.prompt_tokens + shape.output_tokens for shape in self.shapes)

    def prompt_quantile(self, quantile: float) -> int:
        """Return a prompt length that this share of the requests does not exceed."""
        below = 0.0
        for length, share in self.prompts:
            below += share
            if below >= quantile - 1e-9:
                return length
        return self.prompts[-1][0]


def quantiles(*, median: float, p95: float, count: int) -> tuple[int, ...]:
    """Return equally likely lengths that a log-normal distribution with these figures has.

    Raises: ValueError when the 95th percentile is below the median
    """
    if not 1 <= median <= p95:
        raise ValueError(f"median must be at least 1 and p95 not below it, got {median} and {p95}")
    spread = math.log(p95 / median) / _P95
    steps = ((2 * index + 1) / (2 * count) for index in range(count))
    return tuple(max(1, round(median * math.exp(spread * NormalDist().inv_cdf(step)))) for step in steps)


def independent(
    prompts: Sequence[int], outputs: Sequence[int], *, requests_per_s: float | None = None, cached_share: float = 0.0
) -> Workload:
    """Return requests in which every prompt length comes with every answer length, equally often."""
    share = 1 / (len(prompts) * len(outputs))
    shapes = tuple(
        RequestShape(prompt_tokens=prompt, output_tokens=output, share=share)
        for prompt in prompts
        for output in outputs
    )
    return Workload(shapes=shapes, requests_per_s=requests_per_s, cached_share=cached_share)


def of_trace(
    requests: Sequence[tuple[int, int]], *, requests_per_s: float | None = None, cached_share: float = 0.0
) -> Workload:
    """Return the kinds of requests of a trace: as many of like length together as there are too many to keep apart.

    Shapes: requests [requests], each (prompt tokens, output tokens)
    Raises: ValueError for an empty trace
    """
    if not requests:
        raise ValueError("a trace needs at least one request")
    ordered = sorted(requests)
    count = min(MAX_SHAPES, len(ordered))
    edges = [len(ordered) * index // count for index in range(count + 1)]
    shapes = []
    for first, end in pairwise(edges):
        group = ordered[first:end]
        shapes.append(
            RequestShape(
                prompt_tokens=max(1, round(sum(prompt for prompt, _ in group) / len(group))),
                output_tokens=max(1, round(sum(output for _, output in group) / len(group))),
                share=len(group) / len(ordered),
            )
        )
    return Workload(shapes=tuple(shapes), requests_per_s=requests_per_s, cached_share=cached_share)
