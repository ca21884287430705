"""What is said of measured links: a matrix, the slowest, those that stand out, and all of it as records.

Owns the wording, and what counts as standing out: always beside the other links of the same nodes, because the links of
a cluster need not be of one kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from .links import MeasuredLink, MeasuredLinks

MOST_COLUMNS = 16
"""Nodes that a matrix has room for."""

_MOST_NAMED = 5
_SLOW = 0.6
_UNEQUAL = 1.5
_LATE, _LATE_S = 3.0, 200e-6
_UNSTEADY, _UNSTEADY_S = 10.0, 5e-3


def text_of(measured: MeasuredLinks) -> str:
    """Return what a person is told."""
    nodes = sorted(measured.addresses)
    parts = [
        f"{len(measured.links)} of {len(nodes) * (len(nodes) - 1)} directions between {len(nodes)} nodes measured in "
        f"{measured.took_s:.1f} s, {measured.moved_bytes / 1e9:.1f} GB moved"
    ]
    if len(nodes) <= MOST_COLUMNS:
        parts.append(
            "GB/s from the node of the row to that of the column / us of half a round trip:\n" + _matrix(measured)
        )
    else:
        parts.append(f"a matrix has room for {MOST_COLUMNS} nodes: --json has all")
    if measured.links:
        parts.append("slowest:\n" + "\n".join(f"  {_said(each)}" for each in _slowest(measured)))
    found = list(suspicions(measured))
    parts.append("suspicious:\n" + "\n".join(f"  {each}" for each in found) if found else "suspicious: none")
    if measured.missing:
        missing = [f"  {each.source} -> {each.target}: {each.why}" for each in measured.missing]
        parts.append("not measured:\n" + "\n".join(missing))
    return "\n\n".join(parts)


def records_of(measured: MeasuredLinks) -> dict[str, Any]:
    """Return a measurement as what JSON can say."""
    return {
        "began_s": measured.began_s,
        "took_s": measured.took_s,
        "moved_bytes": measured.moved_bytes,
        "nodes": dict(measured.addresses),
        "links": [_record(each) for each in measured.links],
        "slowest": [_record(each) for each in _slowest(measured)],
        "suspicious": list(suspicions(measured)),
        "missing": [{"source": each.source, "target": each.target, "why": each.why} for each in measured.missing],
    }


def suspicions(measured: MeasuredLinks) -> Iterator[str]:
    """Yield what stands out, as sentences."""
    rates = {(each.source, each.target): each.figures.bytes_per_s for each in measured.links}
    trips = {(each.source, each.target): each.figures.round_trip_s for each in measured.links}
    yield from _slow_nodes(rates)
    for (source, target), rate in sorted(rates.items()):
        usual = min(_others(rates, source, target, quarter=1), default=0.0)
        if rate < _SLOW * usual:
            yield f"{source} -> {target}: {rate / 1e9:.3g} GB/s, where both have {usual / 1e9:.3g} with others"
        back = rates.get((target, source))
        if back is not None and back > _UNEQUAL * rate:
            yield f"{source} -> {target}: {rate / 1e9:.3g} GB/s, and {back / 1e9:.3g} the other way"
        trip = trips[source, target]
        late = max(_others(trips, source, target, quarter=3), default=trip)
        if source < target and trip > max(_LATE * late, late + _LATE_S):
            yield f"{source} - {target}: a round trip takes {trip * 1e6:.0f} us, and {late * 1e6:.0f} with others"
    for each in measured.links:
        worst, usual_s = each.figures.round_trip_p99_s, each.figures.round_trip_s
        if worst > max(_UNSTEADY * usual_s, _UNSTEADY_S):
            yield (
                f"{each.source} -> {each.target}: one round trip in a hundred takes over {worst * 1e3:.1f} ms, "
                f"and most {usual_s * 1e3:.2f} ms"
            )


def _slow_nodes(rates: dict[tuple[str, str], float]) -> Iterator[str]:
    """Yield the nodes all of whose links are slow: one cause, not many."""
    names = sorted({name for pair in rates for name in pair})
    usual = {name: median(rate for pair, rate in rates.items() if name in pair) for name in names}
    if len(names) < 3:
        return
    all_nodes = median(usual.values())
    for name, rate in usual.items():
        if rate < _SLOW * all_nodes:
            yield f"{name}: its links have {rate / 1e9:.3g} GB/s, those of other nodes {all_nodes / 1e9:.3g}"


def _others(figures: dict[tuple[str, str], float], source: str, target: str, *, quarter: int) -> list[float]:
    """Return a quartile of what each of two nodes has with others; nothing where one of them has no others.

    Quartiles, because a node may well have few links of a kind, such as those inside its rack.
    """
    found = []
    for name in (source, target):
        others = sorted(value for pair, value in figures.items() if name in pair and set(pair) != {source, target})
        if not others:
            return []
        found.append(others[(len(others) - 1) * quarter // 4])
    return found


def _slowest(measured: MeasuredLinks) -> list[MeasuredLink]:
    return sorted(measured.links, key=lambda each: (each.figures.bytes_per_s, each.source, each.target))[:_MOST_NAMED]


def _matrix(measured: MeasuredLinks) -> str:
    names = sorted(measured.addresses)
    cells = {
        (each.source, each.target): f"{each.figures.bytes_per_s / 1e9:.3g} / {each.figures.link.latency_s * 1e6:.0f}"
        for each in measured.links
    }
    rows = [["", *names]] + [
        [source, *(cells.get((source, target), "-" if source == target else "?") for target in names)]
        for source in names
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(names) + 1)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _said(each: MeasuredLink) -> str:
    figures = each.figures
    return (
        f"{each.source} -> {each.target}: {figures.bytes_per_s / 1e9:.3g} GB/s, round trip "
        f"{figures.round_trip_s * 1e6:.0f} us (99 %: {figures.round_trip_p99_s * 1e6:.0f} us)"
    )


def _record(each: MeasuredLink) -> dict[str, Any]:
    return {
        "source": each.source,
        "target": each.target,
        "bytes_per_s": each.figures.bytes_per_s,
        "round_trip_s": each.figures.round_trip_s,
        "round_trip_p99_s": each.figures.round_trip_p99_s,
    }
