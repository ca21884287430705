"""What steps say of the prompts that are sent, kept until the rank's KV thread has time for it.

The step thread only writes down how far each transfer is, under a lock that nobody holds for long; notes of one
transfer replace one another, so that there is one a transfer however far behind the reader is. Implements ``StepKv``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from ..clock import Clock


@dataclass(slots=True)
class Progress:
    """How far a transfer's prompt is computed. Layers count as the rank does.

    ``blocks``: at this rank, from the prompt's first token. ``layers``: up to where, by layer; ``stop``: all of them.
    Units: at_s, when all layers were as far as ``stop``
    """

    blocks: list[int]
    layers: dict[int, int] = field(default_factory=dict)
    stop: int = 0
    at_s: float = 0.0


class StepNotes:
    """Progress by transfer, since it was taken last."""

    def __init__(self, *, serial_below_tokens: int, clock: Clock, wake: Callable[[], None]) -> None:
        """``wake``: called when there is something to take."""
        self._serial_below_tokens = serial_below_tokens
        self._clock = clock
        self._wake = wake
        self._lock = threading.Lock()
        self._notes: dict[int, Progress] = {}
        # Of the step that runs; the step thread's own.
        self._rows: list[tuple[int, list[int], int]] = []
        self._layer_by_layer: list[tuple[int, list[int], int]] = []

    def begin_step(self, numbers: list[int], blocks: list[list[int]], stops: list[int]) -> None:
        """Note which rows are sent."""
        self._rows = list(zip(numbers, blocks, stops, strict=True))
        # A short prompt is computed sooner than its layers could be posted one by one.
        self._layer_by_layer = [row for row in self._rows if row[2] >= self._serial_below_tokens]

    def layer_done(self, layer: int) -> None:
        """Note that a layer has written its KV."""
        if not self._layer_by_layer:
            return
        with self._lock:
            for number, blocks, stop in self._layer_by_layer:
                self._of(number, blocks).layers[layer] = stop
        self._wake()

    def end_step(self) -> None:
        """Note that all layers have."""
        now_s = self._clock()
        with self._lock:
            for number, blocks, stop in self._rows:
                note = self._of(number, blocks)
                note.layers.clear()
                note.stop, note.at_s = stop, now_s
        if self._rows:
            self._wake()
        self._rows = self._layer_by_layer = []

    def take(self) -> dict[int, Progress]:
        """Return what was noted."""
        with self._lock:
            notes, self._notes = self._notes, {}
        return notes

    def _of(self, number: int, blocks: list[int]) -> Progress:
        note = self._notes.get(number)
        if note is None:
            note = self._notes[number] = Progress(blocks)
        note.blocks = blocks
        return note
