"""A folder for sockets with names that goes with its process, also one that was killed.

Whoever is killed cannot remove anything. So each folder has a file that its process holds locked, and who makes a
folder removes those whose lock nobody holds: the kernel lets go of it however a process ends.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_PREFIX = "slipstream-kv-"
_LOCK = "lock"


class OwnFolder:
    """A folder below the one for temporary files. It has to be closed."""

    def __init__(self) -> None:
        _sweep(Path(tempfile.gettempdir()))
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        # Locked under another name first: nobody must find it, and not locked.
        fresh = self.path / f"{_LOCK}.new"
        self._lock = os.open(fresh, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        fresh.rename(self.path / _LOCK)

    def close(self) -> None:
        """Remove it. Idempotent."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _sweep(root: Path) -> None:
    """Remove what processes left behind that were killed."""
    for folder in root.glob(f"{_PREFIX}*"):
        # It may go in the same moment, be another user's, or still be made.
        with suppress(OSError):
            lock = os.open(folder / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
