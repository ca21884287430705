"""The checksum of a frame: xxh3 over what its header names and all its bytes, so that neither can change unseen.

Against broken memory, cables and code, not against somebody who means it: that is what the handshake is for.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

from .frame import KvFrame


class FrameChecksum:
    """A checksum that grows with the frame's bytes, in their order."""

    def __init__(self, frame: KvFrame) -> None:
        self._digest = xxhash.xxh3_64(frame.names())

    def add(self, run: memoryview) -> None:
        """Take the next bytes in."""
        self._digest.update(run)

    @property
    def value(self) -> int:
        """64 bits over all of it."""
        return self._digest.intdigest()


def frame_checksum(frame: KvFrame, runs: Iterable[memoryview]) -> int:
    """Return 64 bits over a frame whose bytes lie in these runs."""
    checksum = FrameChecksum(frame)
    for run in runs:
        checksum.add(run)
    return checksum.value
