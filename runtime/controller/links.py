"""What was measured between nodes, as it is kept and as planning takes it. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...placement.link_classes import Pair, in_classes
from ...placement.replica_links import slowest
from ...placement.topology import Link


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFigures:
    """One direction of one link.

    Units: bytes_per_s, of all streams together; round_trip_s, the median of small messages; round_trip_p99_s, which one
    in a hundred exceeds; moved_bytes, what was received to find out
    """

    bytes_per_s: float
    round_trip_s: float
    round_trip_p99_s: float
    moved_bytes: int = 0

    @property
    def link(self) -> Link:
        """The link as placement has it."""
        return Link(bytes_per_s=self.bytes_per_s, latency_s=self.round_trip_s / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLink:
    """What bytes from ``source`` to ``target`` have."""

    source: str
    target: str
    figures: LinkFigures


@dataclass(frozen=True, slots=True, kw_only=True)
class UnmeasuredLink:
    """A direction of which nothing is known, and why."""

    source: str
    target: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLinks:
    """One measurement of a cluster.

    ``addresses``: of the nodes, by name: figures hold only while a node has the same one.
    Units: began_s, since 1970; took_s
    """

    began_s: float
    took_s: float
    addresses: Mapping[str, str]
    links: tuple[MeasuredLink, ...]
    missing: tuple[UnmeasuredLink, ...] = ()
    moved_bytes: int = field(default=0)

    def pairs(self, addresses: Mapping[str, str]) -> dict[Pair, Link]:
        """Return the links between nodes that are where they were, each as its slower direction has it, in classes."""
        there = {name for name, address in self.addresses.items() if addresses.get(name) == address}
        found: dict[Pair, list[Link]] = {}
        for each in self.links:
            if each.source in there and each.target in there:
                pair = (min(each.source, each.target), max(each.source, each.target))
                found.setdefault(pair, []).append(each.figures.link)
        slower = {pair: slowest(links) for pair, links in found.items()}
        return in_classes({pair: link for pair, link in slower.items() if link is not None})
