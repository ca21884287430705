"""Which replica gets the next request: the least loaded, and those that are equally loaded in turn.

A core: no clock, no asyncio, no sessions. A replica's load is what its newest report says, and what was sent to it
since: a report that is not there yet must not draw everything to one replica. Both count sequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(slots=True)
class _Standing:
    """``turn``: when it was chosen last, counted in choices."""

    reported: int = 0
    sent: int = 0
    turn: int = 0


class Balance:
    """What is known of replicas' loads, by their names."""

    def __init__(self) -> None:
        self._standings: dict[str, _Standing] = {}
        self._turn = 0

    def report(self, name: str, load: int) -> None:
        """Take in a replica's newest report, which counts what was sent before."""
        standing = self._standing(name)
        standing.reported, standing.sent = load, 0

    def forget(self, name: str) -> None:
        """Forget a replica that is gone."""
        self._standings.pop(name, None)

    def least(self, names: Iterable[str]) -> str | None:
        """Return the least loaded of these; of several the one that was chosen longest ago. None of none."""
        return min(names, key=self._rank, default=None)

    def send(self, name: str, sequences: int) -> None:
        """Note that a request of so many sequences goes to a replica."""
        self._turn += 1
        standing = self._standing(name)
        standing.sent += sequences
        standing.turn = self._turn

    def _rank(self, name: str) -> tuple[int, int]:
        standing = self._standing(name)
        return standing.reported + standing.sent, standing.turn

    def _standing(self, name: str) -> _Standing:
        return self._standings.setdefault(name, _Standing())
