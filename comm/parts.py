"""Computation that communicates, written as generators: whoever runs one decides what happens while it waits.

A piece of a forward pass yields a ``Work`` where it needs another rank, is sent its result, and returns its own. Run by
itself it waits at each of them; run beside another one, the other computes meanwhile (``overlap``). With one rank
nothing is yielded.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

from torch import Tensor

from .collectives import Work

_T = TypeVar("_T")

Parts = Generator[Work, Tensor, _T]
"""Yields what it waits for, is sent the result of that, and returns its own."""


def run_plain(parts: Parts[_T]) -> _T:
    """Run one computation to its end, waiting wherever it does.

    Raises: what it raises, and the errors of ``Work.wait``, which it sees first
    """
    try:
        work = next(parts)
        while True:
            try:
                result = work.wait()
            except BaseException as error:
                work = parts.throw(error)
            else:
                work = parts.send(result)
    except StopIteration as end:
        value: _T = end.value
        return value
