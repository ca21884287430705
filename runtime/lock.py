"""The lock around an engine: made here, so that cores know no threads."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager


def engine_lock() -> AbstractContextManager[bool]:
    """Return a lock that the thread which holds it may take again."""
    return threading.RLock()
