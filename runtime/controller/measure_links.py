"""Every link between some nodes, measured: who meets whom when, and what is noted of it.

Owns the order, in rounds of pairs that share no node, and the deadline of the whole. How nodes are reached is the
business of who implements ``Ends``. A link that cannot be measured does not keep the others from being so.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from ..clock import Clock
from .cluster import ClusterError
from .link_rounds import rounds_of
from .link_wire import ProbeError
from .links import LinkFigures, MeasuredLink, MeasuredLinks, UnmeasuredLink

_MOST_AT_ONCE = 64


class Ends(Protocol):
    """The nodes' ends of links. All calls are bounded in time."""

    def listen(self, node: str, token: str, *, timeout_s: float) -> str:
        """Let a node listen for one measurement, and return where. Raises: ProbeError, ClusterError"""
        ...

    def measure(self, node: str, where: str, token: str, *, timeout_s: float) -> LinkFigures:
        """Let a node measure what comes from a listener. Raises: ProbeError, ClusterError"""
        ...


class _Measuring:
    """One measurement of a cluster."""

    def __init__(self, ends: Ends, *, clock: Clock, timeout_s: float) -> None:
        self._ends = ends
        self._clock = clock
        self._timeout_s = timeout_s
        self._deadline_s = clock() + timeout_s

    def both(self, pair: tuple[str, str]) -> list[MeasuredLink | UnmeasuredLink]:
        """Measure both directions between two nodes, one after the other."""
        one, other = pair
        return [self._one(one, other), self._one(other, one)]

    def _one(self, source: str, target: str) -> MeasuredLink | UnmeasuredLink:
        left_s = self._deadline_s - self._clock()
        if left_s <= 0:
            return UnmeasuredLink(source=source, target=target, why=f"the {self._timeout_s:g} s for all were over")
        # For this measurement alone: a connection of any other has no part in it.
        token = secrets.token_hex(32)
        try:
            where = self._ends.listen(source, token, timeout_s=left_s)
            figures = self._ends.measure(target, where, token, timeout_s=left_s)
        except (ProbeError, ClusterError) as error:
            return UnmeasuredLink(source=source, target=target, why=str(error))
        return MeasuredLink(source=source, target=target, figures=figures)


def measure_links(
    ends: Ends,
    addresses: Mapping[str, str],
    *,
    timeout_s: float,
    clock: Clock,
    wall: Clock,
    tell: Callable[[str], None] = lambda text: None,
) -> MeasuredLinks:
    """Measure the links between all pairs of nodes, both ways. ``addresses``: of the nodes, by name"""
    began_s, began = clock(), wall()
    measuring = _Measuring(ends, clock=clock, timeout_s=timeout_s)
    found: list[MeasuredLink | UnmeasuredLink] = []
    rounds = rounds_of(sorted(addresses))
    for number, pairs in enumerate(rounds, 1):
        with ThreadPoolExecutor(max_workers=min(len(pairs), _MOST_AT_ONCE)) as pool:
            for directions in pool.map(measuring.both, pairs):
                found += directions
        tell(f"round {number} of {len(rounds)}: {', '.join(f'{a} - {b}' for a, b in pairs)}")
    links = tuple(each for each in found if isinstance(each, MeasuredLink))
    return MeasuredLinks(
        began_s=began,
        took_s=clock() - began_s,
        addresses=dict(addresses),
        links=links,
        missing=tuple(each for each in found if isinstance(each, UnmeasuredLink)),
        moved_bytes=sum(each.figures.moved_bytes for each in links),
    )
