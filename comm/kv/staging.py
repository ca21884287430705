"""A device's KV for transports: frames pass through buffers, in and out, on the host or on the device itself.

A frame's bytes lie in one piece in a buffer, so a device's copy and a socket's call are one each. What comes in goes to
the cache only when it is whole and checked. On the wire numbers may be of another type than in the cache: they change
on the way to a buffer and out of it. Buffers are few: who finds none waits for one, for a bounded time; those out and
those in are apart, so that two ends that send to one another cannot wait for each other's. On a GPU copies run on
streams of their own, beside the model's.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...kernels.kv_pack import gather_rows, scatter_rows
from ..errors import CommMisuse, CommTimeout
from .memory import Runs, address_of
from .runs import KvShape, Numbers

_cuda: Any = torch.cuda  # its functions are annotated in part only


@dataclass(frozen=True, slots=True, kw_only=True)
class StagingLimits:
    """Bounds of what is staged. Units: buffers, each way, of a frame's size; timeout_s, of waiting for one."""

    buffers: int = 8
    timeout_s: float = 10.0

    def __post_init__(self) -> None:
        if self.buffers < 1 or self.timeout_s <= 0:
            raise CommMisuse(f"staging needs buffers and time, got {self}")


class Copier(Protocol):
    """Copies rows between a cache and buffers; the bytes are there when a call returns."""

    def mark(self) -> None:
        """Note that what was enqueued by this thread before now writes what will be fetched after now."""
        ...

    def buffer(self, count: int) -> Tensor:
        """Return memory of so many bytes for a frame to pass through."""
        ...

    def runs(self, buffer: Tensor, count: int) -> Runs:
        """Return the first bytes of a buffer as a frame's."""
        ...

    def fetch(self, rows: Tensor, index: Tensor, out: Tensor) -> None:
        """Copy some rows of a device's into a buffer, as numbers of its type.

        Shapes: rows [all, row]; index [some]; out [some, row]
        """
        ...

    def put(self, rows: Tensor, index: Tensor, source: Tensor) -> None:
        """Copy a buffer into some rows of a device's, as numbers of their type. Shapes: as of ``fetch``"""
        ...


class HostCopier:
    """For tensors on the CPU."""

    def runs(self, buffer: Tensor, count: int) -> Runs:
        """Return memory of this process."""
        return _host_runs(buffer, count)

    def mark(self) -> None:
        """Nothing: what was called has been done."""

    def buffer(self, count: int) -> Tensor:
        """Return memory."""
        return torch.empty(count, dtype=torch.uint8)

    def fetch(self, rows: Tensor, index: Tensor, out: Tensor) -> None:
        """Copy rows out."""
        gather_rows(rows, index, out)

    def put(self, rows: Tensor, index: Tensor, source: Tensor) -> None:
        """Copy rows in."""
        scatter_rows(rows, index, source)


class CudaCopier:
    """For tensors on a GPU, with a stream for each way."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out, self._in = _cuda.Stream(device), _cuda.Stream(device)
        self._marked: Any = None

    def mark(self) -> None:
        """Have later fetches wait for what the caller's stream has to do."""
        event = _cuda.Event()
        event.record(_cuda.current_stream(self._device))
        self._marked = event

    def buffer(self, count: int) -> Tensor:
        """Return memory that the device reads and writes by itself."""
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)

    def runs(self, buffer: Tensor, count: int) -> Runs:
        """Return memory of this process."""
        return _host_runs(buffer, count)

    def fetch(self, rows: Tensor, index: Tensor, out: Tensor) -> None:
        """Copy rows out."""
        with _cuda.stream(self._out):
            if self._marked is not None:
                self._out.wait_event(self._marked)
            packed = torch.empty(out.shape, dtype=out.dtype, device=self._device)
            gather_rows(rows, index.to(self._device), packed)
            out.copy_(packed, non_blocking=True)
            self._wait(self._out)

    def put(self, rows: Tensor, index: Tensor, source: Tensor) -> None:
        """Copy rows in."""
        with _cuda.stream(self._in):
            scatter_rows(rows, index.to(self._device), source.to(self._device, non_blocking=True))
            self._wait(self._in)

    def _wait(self, stream: Any) -> None:
        # For this copy alone: other threads go on to use the stream.
        event = _cuda.Event()
        event.record(stream)
        event.synchronize()


class DeviceRuns(Runs):
    """A frame's bytes on a device: a transport that moves them there takes ``piece``; nobody else can have them."""

    def __init__(self, piece: Tensor) -> None:
        self.piece = piece

    @property
    def num_bytes(self) -> int:
        """All bytes together."""
        return len(self.piece)

    def __len__(self) -> int:
        raise CommMisuse("KV that stays on a device has no checksums: offer it without, or go through the host")


class OnDevice:
    """For transports that move a device's memory: frames pass through buffers over there, in one piece each."""

    def __init__(self, copier: Copier, device: torch.device) -> None:
        self._device = device
        self.mark, self.fetch, self.put = copier.mark, copier.fetch, copier.put

    def buffer(self, count: int) -> Tensor:
        """Return the device's memory."""
        return torch.empty(count, dtype=torch.uint8, device=self._device)

    def runs(self, buffer: Tensor, count: int) -> DeviceRuns:
        """Return the piece."""
        return DeviceRuns(buffer[:count])


def _host_runs(buffer: Tensor, count: int) -> Runs:
    view = buffer.numpy().data
    return Runs(view, address_of(view), np.zeros(1, dtype=np.int64), np.full(1, count, dtype=np.int64))


class Buffers:
    """Buffers, a bounded number of them, each used again."""

    def __init__(self, copier: Copier, limits: StagingLimits) -> None:
        self._copier = copier
        self._limits = limits
        self._free: list[Tensor] = []
        self._lent = 0
        self._changed = threading.Condition()

    def take(self, count: int) -> Tensor:
        """Return a buffer of at least so many bytes. Raises: CommTimeout when none is given back in time"""
        with self._changed:
            if not self._changed.wait_for(lambda: self._lent < self._limits.buffers, self._limits.timeout_s):
                raise CommTimeout(f"all {self._limits.buffers} buffers for staging KV are in use")
            self._lent += 1
            buffer = self._free.pop() if self._free else None
        try:
            # One that is too small makes room for one that is not: frames are of few sizes.
            return buffer if buffer is not None and len(buffer) >= count else self._copier.buffer(count)
        except BaseException:
            self._returned()
            raise

    def give(self, buffer: Tensor) -> None:
        """Give a buffer back."""
        self._free.append(buffer)
        self._returned()

    def _returned(self) -> None:
        with self._changed:
            self._lent -= 1
            self._changed.notify()


class StagedStore:
    """The KV of a rank that is on a device, or of another type than on the wire: a ``KvStore``.

    ``shape``: the cache's; the store's own is that of what crosses, of which all frames are. ``wire``: the type of
    numbers there, None as in the cache.
    Shapes: layers [parts, num_blocks, heads, block_size, head_dim] each, contiguous, of one type and on one device
    """

    def __init__(
        self,
        shape: KvShape,
        layers: Sequence[Tensor],
        copier: Copier,
        limits: StagingLimits | None = None,
        *,
        wire: torch.dtype | None = None,
    ) -> None:
        if len(layers) != len(shape.layers) or any(layer.nbytes != shape.layer_bytes for layer in layers):
            raise CommMisuse(f"{len(layers)} layers of a device's KV are not what its shape says: {shape}")
        self._cached = self.shape = shape
        self._layers = [layer.view(-1) for layer in layers]
        kept = layers[0].dtype
        self._wire = None if wire in (None, kept) else wire
        if self._wire is not None:
            self.shape = replace(shape, row_bytes=shape.row_bytes // kept.itemsize * self._wire.itemsize)
        self._copier = copier
        limits = limits or StagingLimits()
        self._out, self._in = Buffers(copier, limits), Buffers(copier, limits)

    @property
    def on_device(self) -> bool:
        """Whether frames pass through buffers on the device."""
        return isinstance(self._copier, OnDevice)

    def mark(self) -> None:
        """Note that the calling thread has enqueued what writes the KV that is sent from now on."""
        self._copier.mark()

    def outward(self, layer: int, heads: range, cuts: Sequence[int], blocks: Sequence[int]) -> Staged:
        """Return some heads' bytes of a layer, fetched."""
        staged = self._staged(self._out, layer, heads, cuts, blocks)
        try:
            self._copier.fetch(staged.rows, staged.index, staged.piece)
        except BaseException:
            staged.end()
            raise
        return staged

    def inward(self, layer: int, heads: range, cuts: Sequence[int], blocks: Sequence[int]) -> Staged:
        """Return a buffer for some heads' bytes of a layer."""
        return self._staged(self._in, layer, heads, cuts, blocks)

    def _staged(self, buffers: Buffers, layer: int, heads: range, cuts: Sequence[int], blocks: Sequence[int]) -> Staged:
        starts, lengths = self._cached.places(heads, cuts, blocks)
        count = int(lengths.sum()) // self._cached.row_bytes * self.shape.row_bytes
        numbers = self._layers[layer - self.shape.layers.start]
        return Staged(self._copier, buffers, count, numbers, starts, lengths, self._wire)


class Staged:
    """A frame of so many bytes in a buffer: a ``Passage``.

    ``rows``, ``index``: where it is in the cache; ``piece``: in the buffer.
    """

    def __init__(
        self,
        copier: Copier,
        buffers: Buffers,
        count: int,
        layer: Tensor,
        starts: Numbers,
        lengths: Numbers,
        wire: torch.dtype | None,
    ) -> None:
        self._copier = copier
        self._buffers = buffers
        # The longest rows of which all runs consist, and the layer too.
        row = gcd(int(np.gcd.reduce(starts)), int(np.gcd.reduce(lengths)), layer.nbytes)
        counts = lengths // row
        first = np.cumsum(counts) - counts
        index = np.arange(counts.sum()) + np.repeat(starts // row - first, counts)
        # What stays as it is moves in words where rows consist of words.
        kept = layer.dtype if wire is not None else torch.int64 if row % 8 == 0 else torch.uint8
        self.rows = layer.view(kept).view(-1, row // kept.itemsize)
        self.index = torch.from_numpy(index)
        buffer = buffers.take(count)
        self._buffer: Tensor | None = buffer
        self.piece = buffer[:count].view(wire or kept).view(-1, self.rows.shape[1])
        self.runs = copier.runs(buffer, count)

    def store(self) -> None:
        """Put what was filled in into the cache."""
        self._copier.put(self.rows, self.index, self.piece)

    def end(self) -> None:
        """Give the buffer back."""
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self._buffers.give(buffer)
