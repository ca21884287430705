"""The direct line: from a drawn token to its client's socket without waking the request's task.

Nearly all that a stream sends is one more piece of text, and waking a task through all its layers for each costs
several times what is done with the piece. So once a sample has begun, whoever brings its tokens may write their text
here. Everything else goes through the task: beginnings, ends, errors, and all text while the client does not keep up.

Owns when the line is open, and the events that travel on it. It must not know tokens.
"""

from __future__ import annotations

from .body_writer import BodyWriter
from .responses import EventTemplate


class DirectLine:
    """One stream's."""

    __slots__ = ("_templates", "_writer")

    def __init__(self) -> None:
        self._writer: BodyWriter | None = None
        self._templates: dict[int, EventTemplate] = {}

    def connect(self, writer: BodyWriter) -> None:
        """Lead to a client, whose stream has begun."""
        self._writer = writer

    def open(self, sample: int, template: EventTemplate) -> None:
        """Let text of a sample through, whose first event has been made."""
        self._templates[sample] = template

    def is_open(self, sample: int) -> bool:
        """Return whether a sample's text may be written now."""
        return self._writer is not None and self._writer.keeps_up and sample in self._templates

    def write(self, sample: int, text: str) -> None:
        """Write the event of a sample's next text; only while the line is open."""
        assert self._writer is not None, "the line leads to nobody"
        self._writer.write(self._templates[sample].write(text))
