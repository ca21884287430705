"""What is observed of a router: tokens per expert, and which experts are chosen together, the past fading out.

Owns the counting. Numbers come in per step, or per several steps at once when somebody faster has summed them, over
ranks too. Must not know what is decided from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


class DecayedCounts:
    """A table of counts in which a step weighs half after ``half_life_steps`` further ones.

    For loads: a row a layer, a column an expert. Only ratios between counts mean anything.
    """

    def __init__(self, rows: int, columns: int, *, half_life_steps: float) -> None:
        for name, size in (("rows", rows), ("columns", columns)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not half_life_steps > 0:
            raise ValueError(f"half_life_steps must be positive, got {half_life_steps}")
        self.half_life_steps = half_life_steps
        self.steps = 0
        self._counts = [[0.0] * columns for _ in range(rows)]

    @property
    def counts(self) -> tuple[tuple[float, ...], ...]:
        """The decayed counts.

        Shapes: [rows][columns]
        """
        return tuple(map(tuple, self._counts))

    def observe(self, counts: Sequence[Sequence[float]], *, steps: int = 1) -> None:
        """Add what the last ``steps`` steps counted together.

        Shapes: counts [rows][columns]
        Raises: ValueError; nothing is added then
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        columns = len(self._counts[0])
        if len(counts) != len(self._counts) or any(len(row) != columns for row in counts):
            raise ValueError(f"counts must be {len(self._counts)} rows of {columns}")
        if not all(0 <= count < math.inf for row in counts for count in row):
            raise ValueError("counts must be finite and not negative")
        keep = 0.5 ** (steps / self.half_life_steps)
        for index, (old, new) in enumerate(zip(self._counts, counts, strict=True)):
            self._counts[index] = [kept * keep + count for kept, count in zip(old, new, strict=True)]
        self.steps += steps


def count_together(choices: Iterable[Sequence[int]], num_experts: int) -> list[list[int]]:
    """Count for every pair of experts the tokens that chose both.

    Shapes: choices [tokens][top_k], an expert each; returns [experts][experts], symmetric, zero on the diagonal
    """
    together = [[0] * num_experts for _ in range(num_experts)]
    for chosen in choices:
        if not all(0 <= expert < num_experts for expert in chosen):
            raise ValueError(f"choices must be among {num_experts} experts, got {tuple(chosen)}")
        for one in chosen:
            row = together[one]
            for other in chosen:
                if other != one:
                    row[other] += 1
    return together
