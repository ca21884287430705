"""How fast KV moves between two replicas, learned from how hand-offs went.

A core. What a transfer costs a request is only what prefill does not hide: layers travel while later ones are computed,
so it is the part of the time on the wire that is longer than the prompt takes, and a rest that no link hides (the last
layer, the reservation, the commitment).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..rpc.engine_client import HandOffReport

_SMOOTHING = 0.2
_LEAST_BYTES = 4096
"""A transfer of less says nothing about a link's speed."""


@dataclass(slots=True)
class _Link:
    bytes_per_s: float
    rest_s: float


class LinkSpeeds:
    """Links by the names of their two ends.

    Units: first_bytes_per_s, of a link while nothing was measured anywhere; first_kv_bytes, of a token likewise
    """

    def __init__(self, *, first_bytes_per_s: float, first_kv_bytes: float) -> None:
        self._links: dict[tuple[str, str], _Link] = {}
        # What a link that nothing is known of is thought to be like: as the others were lately.
        self._typical = _Link(first_bytes_per_s, 0.0)
        self._kv_bytes = first_kv_bytes
        self._measured = False

    @property
    def kv_bytes(self) -> float:
        """Bytes of one token's KV."""
        return self._kv_bytes

    def bytes_per_s(self, prefill: str, decode: str) -> float:
        """Return how fast the link between two replicas is thought to be."""
        return self._links.get((prefill, decode), self._typical).bytes_per_s

    def extra_s(self, prefill: str, decode: str, *, tokens: int, hidden_behind_s: float) -> float:
        """Return by how much moving so many tokens' KV delays a request whose prompt takes ``hidden_behind_s``."""
        link = self._links.get((prefill, decode), self._typical)
        return link.rest_s + max(0.0, tokens * self._kv_bytes / link.bytes_per_s - hidden_behind_s)

    def note(self, prefill: str, decode: str, report: HandOffReport, *, tokens: int) -> None:
        """Learn from a hand-off that went well; ``tokens``: that were thought to be sent, 0 when that is not known."""
        if report.bytes_moved < _LEAST_BYTES or report.wire_s <= 0:
            return
        speed = report.bytes_moved / report.wire_s
        rest_s = max(0.0, report.wait_s - max(0.0, report.wire_s - report.prefill_s))
        link = self._links.get((prefill, decode))
        if link is None:
            self._links[prefill, decode] = _Link(speed, rest_s)
        else:
            _approach(link, speed, rest_s)
        if not self._measured:
            self._typical = _Link(speed, rest_s)
            self._kv_bytes = report.bytes_moved / tokens if tokens > 0 else self._kv_bytes
            self._measured = True
            return
        _approach(self._typical, speed, rest_s)
        if tokens > 0:
            self._kv_bytes += _SMOOTHING * (report.bytes_moved / tokens - self._kv_bytes)

    def forget(self, name: str) -> None:
        """Forget the links of a replica that is gone."""
        for pair in [pair for pair in self._links if name in pair]:
            del self._links[pair]


def _approach(link: _Link, bytes_per_s: float, rest_s: float) -> None:
    link.bytes_per_s += _SMOOTHING * (bytes_per_s - link.bytes_per_s)
    link.rest_s += _SMOOTHING * (rest_s - link.rest_s)
