"""What is measured: sizes of stacks and of steps. Plain values, which go to the ranks as JSON.

The sizes are such that the wire takes between a third of the compute and as much on one link or another, and less or
more on the others; the last of each kind are too small to cut.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One stack and one step; where experts are ``spread``, a step of each rank."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    experts: int
    tokens: int
    spread: bool = False

    def line(self, *, repeats: int, order: str) -> dict[str, Any]:
        """Return what a rank is asked."""
        return {**asdict(self), "repeats": repeats, "order": order}


POINTS = (
    Point(name="dense-512", hidden=512, intermediate=2048, layers=8, experts=0, tokens=512),
    Point(name="dense-1024", hidden=1024, intermediate=4096, layers=6, experts=0, tokens=512),
    Point(name="dense-2048", hidden=2048, intermediate=8192, layers=4, experts=0, tokens=256),
    Point(name="moe-512", hidden=512, intermediate=1024, layers=6, experts=8, tokens=1024),
    Point(name="moe-1024", hidden=1024, intermediate=2048, layers=4, experts=8, tokens=512),
    Point(name="ep-512", hidden=512, intermediate=1024, layers=8, experts=8, tokens=512, spread=True),
    Point(name="dense-512", hidden=512, intermediate=2048, layers=8, experts=0, tokens=64),
    Point(name="dense-512", hidden=512, intermediate=2048, layers=8, experts=0, tokens=4),
    Point(name="moe-512", hidden=512, intermediate=1024, layers=8, experts=8, tokens=16),
)
QUICK = (
    Point(name="dense-512", hidden=512, intermediate=2048, layers=4, experts=0, tokens=256),
    Point(name="moe-512", hidden=512, intermediate=1024, layers=4, experts=8, tokens=256),
    Point(name="ep-512", hidden=512, intermediate=1024, layers=4, experts=8, tokens=128, spread=True),
    Point(name="dense-512", hidden=512, intermediate=2048, layers=4, experts=0, tokens=4),
)
