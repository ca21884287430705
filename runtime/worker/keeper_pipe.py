"""The pipe to whoever keeps a rank's process, on its standard input: a first line, and an end that ends the process.

The end of a pipe is noticed whichever way its writer went, and whatever this process is doing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from ...comm.errors import CommTimeout

MAX_LINE_BYTES = 1 << 16
_CHUNK_BYTES = 4096


class KeeperPipe:
    """Reads a descriptor to its end, on a thread of its own, and then calls ``on_end`` there.

    By the descriptor: Python's own standard input has a lock, which a thread that waits in it still holds when the
    interpreter ends.
    """

    def __init__(self, descriptor: int, on_end: Callable[[], object]) -> None:
        self._descriptor = descriptor
        self._on_end = on_end
        self._first: Future[str] = Future()
        threading.Thread(target=self._read, name="slipstream-keeper", daemon=True).start()

    def line(self, timeout_s: float) -> str:
        """Return the first line, without its end; one that is too long comes cut.

        Raises: CommTimeout when none comes
        """
        try:
            return self._first.result(timeout_s)
        except FutureTimeoutError as error:
            raise CommTimeout(f"nobody said within {timeout_s:g} s where the replica meets") from error

    def _read(self) -> None:
        head = bytearray()
        while chunk := os.read(self._descriptor, _CHUNK_BYTES):
            if self._first.done():
                continue
            before, newline, _ = chunk.partition(b"\n")
            head += before
            if newline or len(head) > MAX_LINE_BYTES:
                self._first.set_result(head[:MAX_LINE_BYTES].decode(errors="replace"))
        self._on_end()
