"""Measured links put into classes: links that differ by no more than measurements do count as one.

No measurement says the same twice. Taken at its word, nearly every pair of nodes would be a domain of its own, and who
keeps groups of ranks on fast links would follow the noise. So the links of a class all get its medians.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from .topology import Link

_GAP = math.log(1.15)
"""Links next to one another in speed that are further apart than this are of two classes."""

_SPAN = math.log(2.0)
"""No class spans more, so that a chain of small steps does not make one of slow and fast."""

Pair = tuple[str, str]


def in_classes(measured: Mapping[Pair, Link]) -> dict[Pair, Link]:
    """Return the links, each with the median figures of its class."""
    ordered = sorted(measured, key=lambda pair: (measured[pair].bytes_per_s, pair))
    speeds = [math.log(measured[pair].bytes_per_s) for pair in ordered]
    found: dict[Pair, Link] = {}
    for first, end in _classes(speeds):
        links = [measured[pair] for pair in ordered[first:end]]
        link = Link(
            bytes_per_s=median(each.bytes_per_s for each in links), latency_s=median(each.latency_s for each in links)
        )
        found.update(dict.fromkeys(ordered[first:end], link))
    return found


def _classes(speeds: Sequence[float]) -> Iterator[tuple[int, int]]:
    """Yield where classes begin and end. Shapes: speeds [links], logarithms, ascending"""
    starts = [index for index in range(1, len(speeds)) if speeds[index] - speeds[index - 1] > _GAP]
    open_ = list(zip([0, *starts], [*starts, len(speeds)], strict=True)) if speeds else []
    while open_:
        first, end = open_.pop()
        span = speeds[end - 1] - speeds[first]
        if span <= _SPAN:
            yield first, end
            continue
        # Nearer the middle than the ends, so that few cuts are enough.
        low, high = speeds[first] + span / 4, speeds[end - 1] - span / 4
        inside = [index for index in range(first + 1, end) if speeds[index] > low and speeds[index - 1] < high]
        cut = max(inside, key=lambda index: speeds[index] - speeds[index - 1])
        open_ += [(first, cut), (cut, end)]
