"""Messages about KV on their way out of one connection: said from any thread, written by one task.

Owns the bound. What cannot be put into bytes is our own fault: it is logged and dropped, because the machine that said
it would otherwise take the driver's thread with it, and says things again anyway.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Generic, TypeVar

from ...sdk.errors import InvalidRequest
from .outbox import HandOver

logger = logging.getLogger(__name__)

MAX_UNSENT_BYTES = 64 << 20
_BYTES_EACH = 64  # what a message takes beside its own bytes

_Said = TypeVar("_Said")


class KvOutlet(Generic[_Said]):
    """One connection's. Units: max_bytes, of messages that wait"""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        encode: Callable[[_Said], bytes],
        *,
        max_bytes: int = MAX_UNSENT_BYTES,
    ) -> None:
        self._encode = encode
        self._waiting = HandOver[bytes](loop, weigh=_weight, max_weight=max_bytes)
        self._closed = False

    def say(self, message: _Said) -> bool:
        """Take a message; False when it is dropped."""
        if self._closed:
            return False
        try:
            data = self._encode(message)
        except InvalidRequest:
            logger.exception("a message about KV cannot be sent and is dropped")
            return False
        return self._waiting.put([data])

    async def get(self) -> list[bytes]:
        """Wait for messages and take all there are; [] once this is closed."""
        return await self._waiting.get()

    def close(self) -> None:
        """Drop what waits and take no more. Idempotent."""
        self._closed = True
        self._waiting.finish([], discard=True)


def _weight(data: bytes) -> int:
    return len(data) + _BYTES_EACH
