"""How a command tells what it sees: lines, JSON objects, or a table that is drawn anew (``screen``).

With ``--json`` every line is one object: ``{"event": ...}`` for all that happens, and a last one,
``{"event": "end", ...}``, with the exit code and the status; so has ``{"event": "serving", ...}`` of a command that
stays.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from ..controller.records import to_json
from .progress import Event
from .status import DeploymentStatus

Write = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a command ended. ``status``: of the deployment then, None where there is none."""

    exit_code: int
    outcome: str
    text: str
    status: DeploymentStatus | None = None
    event: str = "end"


class Reporter(Protocol):
    """What a command tells."""

    def show(self, status: DeploymentStatus, happened: Iterable[Event]) -> None:
        """Show a look and what has happened since the one before."""
        ...

    def events(self, happened: Iterable[Event]) -> None:
        """Show what has happened."""
        ...

    def say(self, text: str) -> None:
        """Show a line that is for people alone."""
        ...

    def status(self, status: DeploymentStatus) -> None:
        """Show a status that was asked for."""
        ...

    def log(self, source: str, number: int, line: str) -> None:
        """Show a line that a process has printed."""
        ...

    def serving(self, ending: Ending) -> None:
        """Show how what the command stays for has come up."""
        ...

    def end(self, ending: Ending) -> None:
        """Show how the command has ended, at last."""
        ...

    def close(self) -> None:
        """Leave what it is shown on as it was. Idempotent."""
        ...


class Lines:
    """A line for everything that happens; ``complain`` gets why a command failed, ``draw`` makes text of a status."""

    def __init__(self, write: Write, complain: Write, draw: Callable[[DeploymentStatus], str]) -> None:
        self._write = write
        self._complain = complain
        self._draw = draw

    def show(self, status: DeploymentStatus, happened: Iterable[Event]) -> None:
        """Show what has happened."""
        self.events(happened)

    def events(self, happened: Iterable[Event]) -> None:
        """Show what has happened."""
        for event in happened:
            self._write(event.text)

    def say(self, text: str) -> None:
        """Show a line."""
        self._write(text)

    def status(self, status: DeploymentStatus) -> None:
        """Show a status."""
        self._write(self._draw(status))

    def log(self, source: str, number: int, line: str) -> None:
        """Show a line of a process."""
        self._write(f"{source} | {line}")

    def serving(self, ending: Ending) -> None:
        """Show where it serves."""
        self._write(ending.text)

    def end(self, ending: Ending) -> None:
        """Show how it has ended."""
        (self._complain if ending.exit_code else self._write)(ending.text)

    def close(self) -> None:
        """Leave it."""


class JsonLines:
    """A JSON object for everything that happens."""

    def __init__(self, write: Write) -> None:
        self._write = write

    def show(self, status: DeploymentStatus, happened: Iterable[Event]) -> None:
        """Show what has happened."""
        self.events(happened)

    def events(self, happened: Iterable[Event]) -> None:
        """Show what has happened; what an event is not about is left out."""
        for event in happened:
            said = {name: value for name, value in json.loads(to_json(event)).items() if value not in ("", None)}
            self._write(json.dumps(said, ensure_ascii=False))

    def say(self, text: str) -> None:
        """Show nothing: programs read this."""

    def status(self, status: DeploymentStatus) -> None:
        """Show a status."""
        self._write(to_json(status))

    def log(self, source: str, number: int, line: str) -> None:
        """Show a line of a process."""
        self._write(json.dumps({"source": source, "number": number, "line": line}, ensure_ascii=False))

    def serving(self, ending: Ending) -> None:
        """Show where it serves, and how."""
        self._write(to_json(replace(ending, event="serving")))

    def end(self, ending: Ending) -> None:
        """Show how it has ended."""
        self._write(to_json(ending))

    def close(self) -> None:
        """Leave it."""
