"""One node's end of the links that are measured: listens or measures, as it is told. What an actor there holds."""

from __future__ import annotations

from dataclasses import dataclass

from .link_listener import LinkListener
from .link_probe import measure
from .link_wire import ProbeError, ProbeLimits
from .links import LinkFigures
from .records import from_json, to_json


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkAnswer:
    """What came of a call: where it listens, figures, or why there are none."""

    where: str = ""
    figures: LinkFigures | None = None
    problem: str = ""


class LinkActor:
    """Listens and connects at its node's own address."""

    def __init__(self, address: str, limits_json: str) -> None:
        self._address = address
        self._limits = from_json(ProbeLimits, limits_json)
        self._listener: LinkListener | None = None

    def listen(self, token: str) -> str:
        """Listen for one measurement, in place of the last; a ``LinkAnswer`` as JSON."""
        self.close()
        try:
            host = f"[{self._address}]" if ":" in self._address else self._address
            self._listener = LinkListener(f"{host}:0", token, self._limits)
        except ProbeError as error:
            return to_json(LinkAnswer(problem=str(error)))
        return to_json(LinkAnswer(where=self._listener.address))

    def measure(self, where: str, token: str) -> str:
        """Measure what comes from a listener; a ``LinkAnswer`` as JSON."""
        try:
            return to_json(LinkAnswer(figures=measure(where, token, self._limits)))
        except ProbeError as error:
            return to_json(LinkAnswer(problem=str(error)))

    def close(self) -> None:
        """End what listens."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
