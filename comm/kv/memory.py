"""A rank's KV as bytes: where the tokens of a frame are read, and where they are stored. Views of memory, no copies.

``KvStore`` is what transports know of a cache. Where it is memory of this process, ``KvMemory``, they read and write it
in place; where it is a device's, or crosses as another type, something stands between (``staging``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Protocol, overload

import numpy as np
from numpy.typing import NDArray

from ..errors import CommMisuse
from .runs import KvShape, Numbers

Spans = NDArray[np.int64]
"""Runs of bytes as the system's calls take them. Shapes: [runs, 2], address and length."""


class Runs(Sequence[memoryview]):
    """The bytes of a frame, in their order, as runs of one piece of memory."""

    def __init__(self, view: memoryview, address: int, starts: Numbers, lengths: Numbers) -> None:
        self._view = view
        self._address = address
        self._starts = starts
        self._lengths = lengths

    @property
    def num_bytes(self) -> int:
        """All bytes together."""
        return int(self._lengths.sum())

    @property
    def spans(self) -> Spans:
        """The runs as addresses and lengths; only as long as the memory is there."""
        spans = np.empty((len(self._starts), 2), dtype=np.int64)
        spans[:, 0] = self._starts + self._address
        spans[:, 1] = self._lengths
        return spans

    @cached_property
    def _views(self) -> list[memoryview]:
        view = self._view
        stops = (self._starts + self._lengths).tolist()
        return [view[start:stop] for start, stop in zip(self._starts.tolist(), stops, strict=True)]

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, at: int) -> memoryview: ...

    @overload
    def __getitem__(self, at: slice) -> list[memoryview]: ...

    def __getitem__(self, at: int | slice) -> memoryview | list[memoryview]:
        return self._views[at]


class Passage(Protocol):
    """A frame's bytes on their way out of a cache, or into it. It has to be ended."""

    @property
    def runs(self) -> Runs:
        """Where they are read, or filled in."""
        ...

    def store(self) -> None:
        """Put what was filled in into the cache, unless that is where it was filled in; it is there when this ends."""
        ...

    def end(self) -> None:
        """Let go of the runs."""
        ...


class KvStore(Protocol):
    """A rank's KV, which stays where it is while a transport has it. For several threads.

    ``heads``, ``cuts``, ``blocks``: as ``KvShape.places`` takes them
    """

    @property
    def shape(self) -> KvShape:
        """What it holds, in the bytes that cross."""
        ...

    def mark(self) -> None:
        """Note that what writes the KV that is sent from now on was called, or enqueued on a device, by this thread."""
        ...

    def outward(self, layer: int, heads: range, cuts: Sequence[int], blocks: Sequence[int]) -> Passage:
        """Return some heads' bytes of a layer, to be sent. Raises: CommTimeout when there is no room for them"""
        ...

    def inward(self, layer: int, heads: range, cuts: Sequence[int], blocks: Sequence[int]) -> Passage:
        """Return where some heads' bytes of a layer go. Raises: CommTimeout when there is no room for them"""
        ...


class InPlace:
    """A passage of memory that is read and written where it is."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs

    def store(self) -> None:
        """Nothing: the bytes are there."""

    def end(self) -> None:
        """Nothing: nothing was lent."""


class KvMemory:
    """The memory of all layers of a rank.

    Raises: CommMisuse when layers are missing, too many, of another size, read-only, or lie over one another
    """

    def __init__(self, shape: KvShape, layers: Sequence[memoryview]) -> None:
        if len(layers) != len(shape.layers):
            raise CommMisuse(f"memory for {len(layers)} layers was registered, the rank has {len(shape.layers)}")
        self.shape = shape
        self._layers = [_flat(layer, shape.layer_bytes) for layer in layers]
        self._addresses = [address_of(view) for view in self._layers]
        for (first, size), (second, _) in pairwise(
            sorted(zip(self._addresses, map(len, self._layers), strict=True)),
        ):
            if first + size > second:
                raise CommMisuse("memory of two layers overlaps, or one was registered twice")

    @property
    def regions(self) -> list[tuple[int, int]]:
        """The address and length of each layer."""
        return list(zip(self._addresses, map(len, self._layers), strict=True))

    def runs(self, layer: int, heads: range, cuts: Sequence[int], blocks: Sequence[int]) -> Runs:
        """Return the bytes of some heads of a layer, in the order of frames."""
        at = layer - self.shape.layers.start
        return Runs(self._layers[at], self._addresses[at], *self.shape.places(heads, cuts, blocks))

    def mark(self) -> None:
        """Nothing: what was called has been done."""

    def outward(self, layer: int, heads: range, cuts: Sequence[int], blocks: Sequence[int]) -> InPlace:
        """Return some heads' bytes of a layer, where they are."""
        return InPlace(self.runs(layer, heads, cuts, blocks))

    def inward(self, layer: int, heads: range, cuts: Sequence[int], blocks: Sequence[int]) -> InPlace:
        """Return where some heads' bytes of a layer belong."""
        return InPlace(self.runs(layer, heads, cuts, blocks))


def address_of(view: memoryview) -> int:
    """Return where memory begins."""
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)


def _flat(layer: memoryview, wanted_bytes: int) -> memoryview:
    if layer.readonly or not layer.c_contiguous:
        raise CommMisuse("memory of a layer has to be writable and contiguous")
    if layer.nbytes != wanted_bytes:
        raise CommMisuse(f"a layer's memory has {layer.nbytes} bytes, its shape says {wanted_bytes}")
    return layer if layer.ndim == 1 and layer.format == "B" else layer.cast("B")
