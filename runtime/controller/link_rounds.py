"""Which pairs of nodes are measured at the same time: rounds in which no node is in two pairs.

Everybody meets everybody once, as in a tournament. Two measurements of one round share no node, and so no network card.
"""

from __future__ import annotations

from collections.abc import Sequence


def rounds_of(names: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Return the rounds; with an odd number of names one of them pauses in each."""
    if len(names) < 2:
        return []
    seats: list[str | None] = [*names, None] if len(names) % 2 else [*names]
    found: list[list[tuple[str, str]]] = []
    for _ in range(len(seats) - 1):
        facing = zip(seats[: len(seats) // 2], reversed(seats[len(seats) // 2 :]), strict=True)
        found.append([(a, b) for a, b in facing if a is not None and b is not None])
        # The first keeps its seat, the others move on by one.
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found
