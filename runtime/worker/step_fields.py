"""Fields of messages on the step bus: arrays as raw bytes, and a reader that believes nothing.

Owns the checks that every decoded value goes through: its name is known, its type right, its size within bounds. Arrays
travel little endian, in the one dtype that the field has; a decoded array is a copy of its own.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Number = TypeVar("Number", bound=np.generic)

_SHOWN_CHARS = 60


class StepCodecError(ValueError):
    """A message of the step bus that cannot be encoded or is not what it should be; names the field."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


def pack_array(field: str, array: NDArray[Any], dtype: type[np.generic]) -> bytes:
    """Return a flat array as bytes.

    Raises: StepCodecError when it has another dtype or shape than the field
    """
    if array.dtype != dtype or array.ndim != 1:
        raise StepCodecError(field, f"must be flat {np.dtype(dtype)}, got {array.dtype} {array.shape}")
    return array.astype(np.dtype(dtype).newbyteorder("<"), copy=False).tobytes()


def unpack_array(
    field: str, data: object, dtype: type[Number], *, minimum: int | None = None, length: int | None = None
) -> NDArray[Number]:
    """Return the array that these bytes are, checked: whole numbers of the dtype, ``length`` of them.

    Raises: StepCodecError
    """
    if not isinstance(data, bytes):
        raise StepCodecError(field, f"must be bytes, got {type(data).__name__}")
    if not data and not length:
        # Most arrays of most steps.
        return np.empty(0, dtype=dtype)
    wire = np.dtype(dtype).newbyteorder("<")
    if len(data) % wire.itemsize:
        raise StepCodecError(field, f"{len(data)} bytes are no whole number of {wire.itemsize}")
    if length is not None and len(data) != length * wire.itemsize:
        raise StepCodecError(field, f"has {len(data) // wire.itemsize} entries, due are {length}")
    array = np.frombuffer(data, dtype=wire).astype(dtype)
    if minimum is not None and len(array) and array.min() < minimum:
        raise StepCodecError(field, f"must be at least {minimum}, got {array.min()}")
    return array


def pack_bits(bits: NDArray[np.bool_]) -> bytes:
    """Return truth values, eight to a byte."""
    return np.packbits(bits).tobytes()


def unpack_bits(field: str, data: object, *, length: int) -> NDArray[np.bool_]:
    """Return ``length`` truth values.

    Raises: StepCodecError
    """
    packed = unpack_array(field, data, np.uint8, length=-(-length // 8))
    return np.unpackbits(packed, count=length).astype(np.bool_)


class Fields:
    """The fields of one decoded map, taken one by one; ``end`` makes sure that none is left."""

    def __init__(self, where: str, value: object) -> None:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise StepCodecError(where, "must be a map with names as keys")
        self._where = where
        self._left: dict[str, Any] = dict(value)

    def take(self, name: str) -> Any:
        """Return a field's value, unchecked.

        Raises: StepCodecError when it is missing
        """
        if name not in self._left:
            raise StepCodecError(self.path(name), "is missing")
        return self._left.pop(name)

    def take_or(self, name: str, default: Any) -> Any:
        """Return a field's value, unchecked, or the default."""
        return self._left.pop(name, default)

    def integer(self, name: str, low: int, high: int) -> int:
        """Return an integer within bounds."""
        value = self.take(name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise StepCodecError(self.path(name), f"must be an integer from {low} to {high}, got {shown(value)}")
        return value

    def number(self, name: str) -> float:
        """Return a float, of any value."""
        value = self.take(name)
        if not isinstance(value, float):
            raise StepCodecError(self.path(name), f"must be a number, got {shown(value)}")
        return value

    def truth(self, name: str) -> bool:
        """Return true or false."""
        value = self.take(name)
        if not isinstance(value, bool):
            raise StepCodecError(self.path(name), f"must be true or false, got {shown(value)}")
        return value

    def array(
        self, name: str, dtype: type[Number], *, minimum: int | None = None, length: int | None = None
    ) -> NDArray[Number]:
        """Return an array; it may be left out when it is empty."""
        return unpack_array(self.path(name), self.take_or(name, b""), dtype, minimum=minimum, length=length)

    def items(self, name: str, *, at_most: int) -> tuple[Any, ...]:
        """Return a list's items, unchecked; it may be left out when it is empty."""
        value = self.take_or(name, ())
        if not isinstance(value, tuple) or len(value) > at_most:
            raise StepCodecError(self.path(name), f"must be a list of at most {at_most}, got {shown(value)}")
        return value

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def end(self) -> None:
        """Make sure that every field was known.

        Raises: StepCodecError
        """
        if self._left:
            raise StepCodecError(self._where, f"unknown field {shown(sorted(self._left)[0])}")

    def path(self, name: str) -> str:
        """Return what errors call a field."""
        return f"{self._where}.{name}"


def shown(value: object) -> str:
    """Return a value for an error's text, bounded: it may be anything, and large."""
    if isinstance(value, bytes | tuple | dict):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, str):
        return repr(value[:_SHOWN_CHARS])
    return repr(value)[:_SHOWN_CHARS]
