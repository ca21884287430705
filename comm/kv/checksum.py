"""The checksum of a frame: xxh3 over what its header names and all its bytes, so that neither can change unseen.

Against broken memory, cables and code, not against somebody who means it: that is what the handshake is for.
"""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from .frame import KvFrame


def frame_checksum(frame: KvFrame, runs: Sequence[memoryview]) -> int:
    """Return 64 bits over a frame whose bytes lie in these runs."""
    digest = xxhash.xxh3_64(frame.names())
    for run in runs:
        digest.update(run)
    return digest.intdigest()
