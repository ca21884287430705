"""Frames: how messages are cut out of a stream of bytes. Pure: bytes in, frames out.

    4 bytes   length of the payload
    1 byte    kind
    8 bytes   sequence number: the step's, 0 where there is none
    ...       payload

Big endian. A length is held against the limit before anything is allocated for it. Knows nothing of sockets, nor of
what payloads mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from struct import Struct

from .errors import BadFrame

HEADER = Struct("!IBQ")
MAX_TEXT_BYTES = 4096
"""Most bytes of a reason or a failure's text; longer ones are cut."""

_CHUNK_BYTES = 1 << 16


class FrameKind(IntEnum):
    """What a frame is."""

    STEP = 1
    RESULT = 2
    FAILURE = 3
    CLOSE = 4
    ORDER = 5
    REPORT = 6
    CHALLENGE = 16
    HELLO = 17
    WELCOME = 18
    REFUSAL = 19
    OFFER = 20


_KINDS = {int(kind): kind for kind in FrameKind}


@dataclass(frozen=True, slots=True)
class Frame:
    """One message."""

    kind: FrameKind
    seq: int
    payload: bytes

    @property
    def text(self) -> str:
        """The payload as text that is safe to show: bounded, whatever the bytes."""
        return self.payload[:MAX_TEXT_BYTES].decode("utf-8", errors="replace")


def text_payload(text: str) -> bytes:
    """Return text as a payload, cut to ``MAX_TEXT_BYTES``."""
    return text.encode("utf-8", errors="replace")[:MAX_TEXT_BYTES]


class FrameReader:
    """Puts frames together: write into ``space()``, say how much with ``advance``, then ``take`` until None.

    Small frames are collected in one buffer, so that one read brings a whole step; a large one gets a buffer of its own
    size, once its length is known and allowed.
    """

    def __init__(self, *, max_payload_bytes: int) -> None:
        self.max_payload_bytes = max_payload_bytes
        self._buffer = bytearray(_CHUNK_BYTES)
        self._start = 0
        self._end = 0
        self._large: bytearray | None = None
        self._large_filled = 0
        self._large_head = (FrameKind.STEP, 0)

    def space(self) -> memoryview:
        """Return where the next bytes go; never empty after ``take`` returned None."""
        if self._large is not None:
            return memoryview(self._large)[self._large_filled :]
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start:
            kept = self._buffer[self._start : self._end]
            self._buffer[: len(kept)] = kept
            self._start, self._end = 0, len(kept)
        return memoryview(self._buffer)[self._end :]

    def advance(self, count: int) -> None:
        """Say how many bytes were written into ``space()``."""
        if self._large is not None:
            self._large_filled += count
        else:
            self._end += count

    def take(self) -> Frame | None:
        """Return the next whole frame; None when bytes are missing.

        Raises: BadFrame
        """
        if self._large is not None:
            return self._take_large(self._large)
        available = self._end - self._start
        if available < HEADER.size:
            return None
        length, number, seq = HEADER.unpack_from(self._buffer, self._start)
        kind = _KINDS.get(number)
        if kind is None:
            raise BadFrame(f"a frame of unknown kind {number}")
        if length > self.max_payload_bytes:
            raise BadFrame(f"a frame announces {length} bytes, more than the limit of {self.max_payload_bytes}")
        first = self._start + HEADER.size
        if available >= HEADER.size + length:
            self._start = first + length
            return Frame(kind, seq, bytes(memoryview(self._buffer)[first : first + length]))
        if HEADER.size + length > _CHUNK_BYTES:
            self._large = bytearray(length)
            self._large_filled = self._end - first
            self._large[: self._large_filled] = self._buffer[first : self._end]
            self._large_head = (kind, seq)
            self._start = self._end = 0
        return None

    def _take_large(self, large: bytearray) -> Frame | None:
        if self._large_filled < len(large):
            return None
        self._large = None
        return Frame(*self._large_head, bytes(large))
