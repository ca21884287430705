"""What a forward pass costs, whole and in parts that hide one another's wire time. Pure: numbers in, numbers out.

The figures are measured at start-up (``overlap_measure``) or given. Ranks that decide by them must have the same.

Words: a pass is ``collectives`` times compute and then a collective; what comes after the last is left out. T tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds as a function of a size: straight between the given points, and after the last as between the last two.

    Below the first point it is flat: half the tokens do not read half the weights.

    Units: sizes in whatever the owner says, seconds
    Raises: ValueError if the sizes do not increase, or a time is negative
    """

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.seconds):
            raise ValueError(f"a curve needs as many sizes as times, at least one, got {self.sizes}, {self.seconds}")
        if any(after <= before for before, after in zip(self.sizes, self.sizes[1:], strict=False)):
            raise ValueError(f"a curve's sizes must increase, got {self.sizes}")
        if min(self.seconds) < 0:
            raise ValueError(f"a curve's times must not be negative, got {self.seconds}")

    @staticmethod
    def line(*, fixed_s: float, per_unit_s: float) -> Curve:
        """Return ``fixed_s + size * per_unit_s``."""
        return Curve((0.0, 1.0), (fixed_s, fixed_s + per_unit_s))

    @staticmethod
    def rising(points: Iterable[tuple[float, float]]) -> Curve:
        """Return the curve through measured points, with each time at least that of the smaller sizes."""
        sizes, seconds, most_s = [], [], 0.0
        for size, measured_s in sorted(points):
            most_s = max(most_s, measured_s)
            sizes.append(size)
            seconds.append(most_s)
        return Curve(tuple(sizes), tuple(seconds))

    def __call__(self, size: float) -> float:
        """Return the seconds for a size."""
        sizes, seconds = self.sizes, self.seconds
        if size <= sizes[0] or len(sizes) == 1:
            return seconds[0]
        right = min(bisect_right(sizes, size), len(sizes) - 1)
        slope = (seconds[right] - seconds[right - 1]) / (sizes[right] - sizes[right - 1])
        return seconds[right] + slope * (size - sizes[right])


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCost:
    """What a pass over some tokens costs.

    ``wire_work`` is the share of a collective's time that it takes from the thread that computes: nothing where a
    device moves the bytes, much where sockets do and no core is free.

    Units: compute_s, tokens to the seconds of a whole pass; collective_s, bytes to the seconds of one collective
    """

    compute_s: Curve
    collective_s: Curve
    collectives: int
    bytes_per_token: float
    wire_work: float = 0.0

    def wire_s(self, tokens: int) -> float:
        """Return the time on the wire of a pass, nothing else going on."""
        return self.collectives * self.collective_s(tokens * self.bytes_per_token)

    def serial_s(self, tokens: int) -> float:
        """Return the time of a pass that waits for each collective at once."""
        return self.compute_s(tokens) + self.wire_s(tokens)

    def overlapped_s(self, parts: Sequence[int]) -> float:
        """Return the time of a pass in parts of so many tokens that take turns.

        Played through: one thread computes for the parts in turns, and gives the wire its share of work; one wire takes
        the collectives in the order in which they begin; a part goes on when its own has come.
        """
        computes_s = [self.compute_s(tokens) / max(self.collectives, 1) for tokens in parts]
        wires_s = [self.collective_s(tokens * self.bytes_per_token) for tokens in parts]
        if not self.collectives:
            return sum(computes_s)
        thread_s, wire_s, arrives_s = 0.0, 0.0, [0.0] * len(parts)
        for _ in range(self.collectives):
            for part, (compute_s, on_wire_s) in enumerate(zip(computes_s, wires_s, strict=True)):
                begins_s = max(thread_s, arrives_s[part]) + compute_s
                thread_s = begins_s + self.wire_work * on_wire_s
                wire_s = arrives_s[part] = max(wire_s, begins_s) + on_wire_s
        return max(thread_s, wire_s)
