"""What a step tells a device, in one copy: all tensors of a batch packed into one piece of pinned memory.

A step's batch is made on the host, of arrays. A copy to a GPU takes about ten microseconds to ask for, whatever its
size: a batch has a dozen tensors or more. Here they are laid one behind the other and copied at once; the tensors of
the batch on the device are views of the one copy. Batches of equal layout can be copied to the same place, which is
how a captured graph finds its inputs.

Knows nothing of what a batch is: anything made of dataclasses, mappings and tuples, with tensors in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")

_ALIGNED = 64
"""Bytes that tensors begin at multiples of: kernels load several numbers at once."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands in the one copy."""

    first_byte: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Return the bytes that the tensor takes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def of(self, memory: Tensor) -> Tensor:
        """Return the tensor in a copy. Shapes: memory [bytes] uint8"""
        return memory[self.first_byte : self.first_byte + self.bytes].view(self.dtype).view(self.shape)


class Packed(Generic[_T]):
    """The tensors of a value that are on the host, and where each will stand; what comes twice is there once."""

    def __init__(self, value: _T) -> None:
        self._value = value
        found: dict[int, Tensor] = {}
        _collect(value, found)
        self._place_of: dict[int, Place] = {}
        self._written: list[tuple[Tensor, Place]] = []
        self.bytes = 0
        # The largest first: others may be parts of them.
        for key in sorted(found, key=lambda key: -found[key].nbytes):
            tensor = found[key]
            first_byte = self._within(tensor)
            place = Place(self.bytes if first_byte is None else first_byte, tensor.dtype, tuple(tensor.shape))
            self._place_of[key] = place
            if first_byte is None:
                self._written.append((tensor, place))
                self.bytes += -(-place.bytes // _ALIGNED) * _ALIGNED

    def _within(self, part: Tensor) -> int | None:
        """Return where a tensor stands as a part of one that is written; None where it has to be written itself."""
        if not part.is_contiguous() or not part.numel():
            return None
        for whole, place in self._written:
            ahead = part.data_ptr() - whole.data_ptr()
            is_part = whole.is_contiguous() and 0 <= ahead <= whole.nbytes - part.nbytes
            if is_part and not (place.first_byte + ahead) % part.element_size():
                return place.first_byte + ahead
        return None

    @property
    def layout(self) -> tuple[Place, ...]:
        """Return where each tensor stands: values of equal layouts can take each other's place."""
        return tuple(self._place_of.values())

    def write(self, memory: Tensor) -> None:
        """Lay the tensors out. Shapes: memory [bytes] uint8, on the host"""
        for tensor, place in self._written:
            place.of(memory).copy_(tensor)

    def over(self, memory: Tensor) -> _T:
        """Return the value with the tensors that stand in a copy in place of those on the host.

        Shapes: memory [bytes] uint8, on any device
        """
        on_device = {key: place.of(memory) for key, place in self._place_of.items()}
        value: _T = _exchanged(self._value, on_device)
        return value

    def upload(self, device: torch.device, into: Tensor | None = None) -> _T:
        """Return the value on a GPU; ``into``: in memory that is there already, in place of what stood there.

        The copy is queued, and not waited for.

        Shapes: into [bytes] uint8, on the device
        """
        host = torch.empty(self.bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.write(host)
        if into is None:
            into = torch.empty(self.bytes, dtype=torch.uint8, device=device)
        into.copy_(host, non_blocking=True)
        return self.over(into)


def upload(value: _T, device: torch.device) -> _T:
    """Return a value whose tensors are on a device, in one copy; on a CPU the value itself."""
    return value if device.type == "cpu" else Packed(value).upload(device)


def _collect(value: object, found: dict[int, Tensor]) -> None:
    if isinstance(value, Tensor):
        if value.device.type == "cpu":
            found[id(value)] = value
    elif is_dataclass(value):
        for field in fields(value):
            _collect(getattr(value, field.name), found)
    elif isinstance(value, Mapping):
        for each in value.values():
            _collect(each, found)
    elif isinstance(value, tuple):
        for each in value:
            _collect(each, found)


def _exchanged(value: Any, on_device: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return on_device.get(id(value), value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: _exchanged(getattr(value, each.name), on_device) for each in fields(value)})
    if isinstance(value, Mapping):
        return {key: _exchanged(each, on_device) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_exchanged(each, on_device) for each in value)
    return value
