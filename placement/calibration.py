"""From measured steps to the factors by which a device falls short of its figures.

A table has steps of three kinds: chunks of prompts at their beginning, chunks behind other positions, and decoding
rows. Rooflines say how a step splits into linear layers and attention; what was measured says by what each part has to
be multiplied. Between measured sizes factors are interpolated, on a logarithmic scale; outside them the nearest counts.

Owns the fit. How steps are measured is not known here.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .model_cut import Cut
from .replica_links import NO_LINKS
from .step_cost import ATTENTION, Efficiency, Step, StepCost
from .topology import DeviceType

_ROUNDS = 8
"""Linear factors and attention factors are found in turns; they settle within a few."""

_LEAST, _MOST = 0.02, 200.0
"""Bounds of a factor: what is beyond them is noise of a part that is a small share of its steps."""

_LEAST_SHARE = 0.02
"""What attention must be of the rest, by the roofline, for a step to say anything about it."""

_TELLING_SHARE = 0.3
"""Share of a step that attention must have for its factor to be believed alone."""

_LEAST_REST = 0.1
"""Share of a measured step that is never put down to attention."""

_NO_FACTORS: dict[str, Any] = {
    name: Efficiency.__dataclass_fields__[name].default
    for name in ("decode_linear", "prefill_linear", "decode_attention", "prefill_attention")
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStep:
    """One point of the table: ``tokens`` of one prompt from position ``context`` on, or ``batch`` rows decoding.

    A prefill point has batch 0, a decode point tokens 0.
    """

    tokens: int = 0
    context: int = 0
    batch: int = 0
    seconds: float

    def __post_init__(self) -> None:
        if (self.tokens > 0) == (self.batch > 0) or self.context < 0 or not self.seconds > 0:
            raise ValueError(f"a measured step has tokens or a batch, and took some time, got {self}")

    @property
    def step(self) -> Step:
        """The step as the cost model has it."""
        if self.batch:
            return Step(decode_rows=self.batch, decode_context=self.context + 1)
        return Step(prefill_tokens=self.tokens, prefill_start=self.context)


@dataclass(frozen=True, slots=True)
class Curve:
    """A factor by size: straight between points where both are logarithms, level outside them."""

    points: tuple[tuple[float, float], ...]

    def __call__(self, size: float) -> float:
        """Return the factor at a size; 1 without points."""
        if not self.points:
            return 1.0
        sizes = [point[0] for point in self.points]
        place = bisect_left(sizes, size)
        if place == 0:
            return self.points[0][1]
        if place == len(sizes):
            return self.points[-1][1]
        (x0, y0), (x1, y1) = self.points[place - 1], self.points[place]
        share = math.log(size / x0) / math.log(x1 / x0)
        return math.exp(math.log(y0) + share * math.log(y1 / y0))


@dataclass(frozen=True, slots=True)
class Surface:
    """A factor by two sizes: a curve over the second for each of some values of the first."""

    curves: tuple[tuple[float, Curve], ...]

    def __call__(self, first: float, second: float) -> float:
        """Return the factor; 1 without points."""
        return Curve(tuple((size, curve(max(1.0, second))) for size, curve in self.curves))(max(1.0, first))


def calibrate(
    points: Sequence[MeasuredStep], *, cut: Cut, device: DeviceType, start: Efficiency | None = None
) -> Efficiency:
    """Return the efficiency with which the cost model gives the measured times, as nearly as its form allows.

    ``cut`` is the one that was measured: one rank, no exchanges. ``start``: what is kept of it is all but the factors.
    """
    start = start or Efficiency()
    plain = StepCost(cut=cut, device=device, links=NO_LINKS, efficiency=replace(start, **_NO_FACTORS))
    roofs = [_Roof.of(point, plain) for point in points]
    fits = [
        _Fit([roof for roof in roofs if (roof.point.batch > 0) == decoding], start.rows) for decoding in (True, False)
    ]
    for fit in fits:
        for _ in range(_ROUNDS):
            fit.improve()
    decode, prefill = fits
    return replace(
        start,
        # Where only one kind was measured, the other's rest is like it.
        decode_linear=decode.linear if decode.linear.points else prefill.linear,
        prefill_linear=prefill.linear if prefill.linear.points else decode.linear,
        decode_attention=decode.attention,
        prefill_attention=prefill.attention,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Roof:
    """A measured step, and what the roofline says of its attention and of the rest."""

    point: MeasuredStep
    rest_s: float
    attention_s: float

    @classmethod
    def of(cls, point: MeasuredStep, cost: StepCost) -> _Roof:
        parts = cost.stage(0, point.step).parts
        attention_s = parts[ATTENTION]
        return cls(point=point, rest_s=sum(parts.values()) - attention_s, attention_s=attention_s)

    @property
    def size(self) -> int:
        return self.point.batch or self.point.tokens


class _Fit:
    """Factors of one kind of steps: of attention by size and context, of the rest by size."""

    def __init__(self, roofs: Sequence[_Roof], rows: Callable[[float], float]) -> None:
        self._rows = rows
        self._by_size: dict[int, list[_Roof]] = {}
        for roof in roofs:
            self._by_size.setdefault(roof.size, []).append(roof)
        self.linear = Curve(())
        self.attention = Surface(())

    def improve(self) -> None:
        """Find the rest's factors by the attention's as they are, then the attention's by those."""
        shortest = [min(roofs, key=_context) for _, roofs in sorted(self._by_size.items())]
        # More rows never take less time: what was measured otherwise is noise, and evened out.
        seconds = rising([self._rest_factor(roof) * roof.rest_s for roof in shortest])
        self.linear = Curve(
            tuple((self._rows(roof.size), rest_s / roof.rest_s) for roof, rest_s in zip(shortest, seconds, strict=True))
        )
        pooled = self._pooled_factor()
        curves = []
        for size, roofs in sorted(self._by_size.items()):
            nearest = min(_context(roof) for roof in roofs)
            curve = tuple(
                (_context(roof), self._attention_factor(roof, pooled))
                for roof in sorted(roofs, key=_context)
                if _context(roof) > nearest and roof.attention_s > _LEAST_SHARE * roof.rest_s
            )
            if curve:
                curves.append((float(size), Curve(curve)))
        self.attention = Surface(tuple(curves))

    def _rest_factor(self, roof: _Roof) -> float:
        attention_s = roof.attention_s * self.attention(roof.size, roof.point.context)
        # Attention cannot have been all of a step.
        return _bounded(max(roof.point.seconds - attention_s, _LEAST_REST * roof.point.seconds) / roof.rest_s)

    def _attention_seconds(self, roof: _Roof) -> float:
        return roof.point.seconds - roof.rest_s * self.linear(self._rows(roof.size))

    def _pooled_factor(self) -> float:
        """Return one factor for all steps that have positions before them; 1 without such."""
        behind = [roof for roofs in self._by_size.values() for roof in roofs if roof.point.context]
        roofline_s = sum(roof.attention_s for roof in behind)
        return _bounded(sum(map(self._attention_seconds, behind)) / roofline_s) if roofline_s else 1.0

    def _attention_factor(self, roof: _Roof, pooled: float) -> float:
        """Return a step's own factor, drawn to the pooled one by as much as attention is a small part of the step."""
        seconds = self._attention_seconds(roof)
        share = min(1.0, max(0.0, seconds / roof.point.seconds) / _TELLING_SHARE)
        own = _bounded(seconds / roof.attention_s)
        return math.exp(share * math.log(own) + (1 - share) * math.log(pooled))


def rising(values: Sequence[float]) -> list[float]:
    """Return the nearest values that never fall: runs that do are replaced by their mean."""
    runs: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while runs and runs[-1][0] > mean:
            before, others = runs.pop()
            mean, count = (before * others + mean * count) / (others + count), others + count
        runs.append((mean, count))
    return [mean for mean, count in runs for _ in range(count)]


def _context(roof: _Roof) -> float:
    return max(1.0, roof.point.context)


def _bounded(factor: float) -> float:
    return min(_MOST, max(_LEAST, factor))
