"""Where a frame lies in its sender's memory, said over a connection: for transports whose receivers read it there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from struct import Struct

import numpy as np

from ..errors import BadFrame
from .channel import MAX_RUNS, SocketEnd
from .memory import Runs, Spans

MAX_SPANS = 1 << 20
"""Runs of one frame in the sender's memory."""

_COUNT = Struct("!I")
_SPANS = np.dtype("<i8")


def said_places(header: bytes, runs: Runs) -> Sequence[bytes]:
    """Return a frame's header with where it is."""
    spans = runs.spans
    return [header, _COUNT.pack(len(spans)), spans.astype(_SPANS, copy=False).tobytes()]


def hear_places(end: SocketEnd, num_bytes: int | None) -> Spans:
    """Return where a frame lies of which the header came; ``num_bytes``: of all of it, None when that does not matter.

    Raises: BadFrame, PeerLost, CommTimeout
    """
    word = bytearray(_COUNT.size)
    end.fill([memoryview(word)])
    (count,) = _COUNT.unpack(word)
    if count > MAX_SPANS:
        raise BadFrame(f"{end.peer} announces a KV frame in {count} places, more than the limit of {MAX_SPANS}")
    places = np.empty((count, 2), dtype=_SPANS)
    if count:
        end.fill([places.data.cast("B")])
    lengths = places[:, 1]
    if num_bytes is not None and (
        not ((lengths > 0) & (lengths <= num_bytes)).all() or int(lengths.sum()) != num_bytes
    ):
        raise BadFrame(f"{end.peer} says that a KV frame lies where it has another size")
    return places.astype(np.int64, copy=False)


def paired(here: Spans, there: Spans, portion_bytes: int) -> Iterator[list[tuple[Spans, Spans]]]:
    """Yield, for each portion of the bytes, what to read in single calls: both sides cut wherever one of them is."""
    ends_here, ends_there = np.cumsum(here[:, 1]), np.cumsum(there[:, 1])
    cuts = np.arange(0, ends_here[-1], portion_bytes)
    starts = np.unique(np.concatenate((cuts, ends_here[:-1], ends_there[:-1])))
    lengths = np.diff(starts, append=ends_here[-1])
    into, out_of = (
        np.stack(
            (
                spans[(at := np.searchsorted(ends, starts, side="right")), 0] + starts - (ends - spans[:, 1])[at],
                lengths,
            ),
            axis=1,
        )
        for spans, ends in ((here, ends_here), (there, ends_there))
    )
    bounds = [*np.searchsorted(starts, cuts).tolist(), len(starts)]
    for first, stop in pairwise(bounds):
        steps = [*range(first, stop, MAX_RUNS), stop]
        yield [(into[low:high], out_of[low:high]) for low, high in pairwise(steps)]
