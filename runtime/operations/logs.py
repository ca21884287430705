"""``slipstream logs``: what the processes of a deployment have printed, and go on to print.

Owns which processes are meant and where reading has got to. What a process printed is kept where it runs, for as long
as somebody keeps the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ...sdk.errors import ConfigError
from ..controller.process_log import PAGE_LINES
from .session import Session

GATEWAYS = "gateway"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One line. ``source``: ``REPLICA/RANK`` or ``gateway/NAME``; ``number``: of the line, from the process' start."""

    source: str
    number: int
    line: str


@dataclass(slots=True)
class LogReader:
    """Reads on where it stopped. ``target``: a replica, ``gateway``, ``gateway/NAME`` or None for all."""

    session: Session
    name: str
    target: str | None
    rank: int | None
    lines: int
    _next: dict[str, int] = field(default_factory=dict)

    def sources(self) -> list[str]:
        """Return the processes that are meant and kept. Raises: ConfigError where there never was such a one"""
        ledger = self.session.ledger(self.name)
        ranks = [
            (str(gang.spec.id), rank)
            for gang in ledger.gangs().values()
            if not gang.gone
            for rank in range(len(gang.devices))
        ]
        gateways = [f"{GATEWAYS}/{order.name}" for order in ledger.deployment().gateways]
        found = [
            f"{replica}/{rank}"
            for replica, rank in ranks
            if self.target in (None, replica) and self.rank in (None, rank)
        ]
        if self.rank is None:
            found += [name for name in gateways if self.target in (None, GATEWAYS, name)]
        if not found and not self._next:
            known = [*dict.fromkeys(replica for replica, _ in ranks), *gateways]
            raise ConfigError("SOURCE", f"nothing runs that would be meant; there is {', '.join(known) or 'nothing'}")
        return found

    def read(self) -> Iterator[LogLine]:
        """Yield what is new. Raises: ConfigError as ``sources``; ClusterError"""
        for source in self.sources():
            actor = source if source.startswith(f"{GATEWAYS}/") else f"rank/{source}"
            begin = self._next.setdefault(source, -self.lines)
            while (page := self.session.operator.log(self.name, actor, begin)) is not None:
                first = page.next - len(page.lines)
                if page.missed and begin >= 0:
                    yield LogLine(source=source, number=first, line=f"... {page.missed} lines are gone ...")
                for number, line in enumerate(page.lines, start=first):
                    yield LogLine(source=source, number=number, line=line)
                self._next[source] = begin = page.next
                if len(page.lines) < PAGE_LINES:
                    break
