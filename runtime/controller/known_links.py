"""The links between nodes that were measured, for who looks often: read again only when something else was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ...placement.link_classes import Pair
from ...placement.topology import Link
from .ledger import Ledger
from .links import MeasuredLinks
from .node_facts import NodeFacts


class KnownLinks:
    """What the cluster's ledger says of links."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._number = 0
        self._measured: MeasuredLinks | None = None
        self._addresses: dict[str, str] = {}
        self._pairs: dict[Pair, Link] = {}

    @property
    def measured(self) -> MeasuredLinks | None:
        """The measurement that ``between`` went by last; None if there is none."""
        return self._measured

    def between(self, nodes: Iterable[NodeFacts]) -> Mapping[Pair, Link]:
        """Return the links between nodes as far as they were measured, and the nodes are where they were."""
        addresses = {node.name: node.address for node in nodes}
        number = self._ledger.links_number()
        if number != self._number:
            self._number, self._measured = number, self._ledger.links()
        elif addresses == self._addresses:
            return self._pairs
        self._addresses = addresses
        self._pairs = {} if self._measured is None else self._measured.pairs(addresses)
        return self._pairs
