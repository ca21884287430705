"""What hand-offs took: when each began, when its prompt was done, and what its ranks moved meanwhile. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ...comm.kv.transfer import Ending
from ..rpc.engine_client import HandOffReport
from .ranks import KvMoved


@dataclass(slots=True)
class HandOffTimes:
    """When one hand-off came how far; seconds on the engine's clock."""

    begun_s: float
    done_s: float | None = None

    def report(self, now_s: float, ending: Ending, moved: KvMoved) -> HandOffReport:
        """Return how it ended."""
        done_s = now_s if self.done_s is None else self.done_s
        return HandOffReport(
            ending=ending.value,
            bytes_moved=moved.bytes_out,
            prefill_s=max(0.0, done_s - self.begun_s),
            wire_s=moved.wire_s,
            hidden_s=min(moved.hidden_s, moved.wire_s),
            wait_s=max(0.0, now_s - done_s),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeskLoad:
    """How busy a desk is: requests that wait for KV, transfers on their way, bytes moved since the start."""

    awaiting: int = 0
    sending: int = 0
    receiving: int = 0
    kv_bytes_out: int = 0
    kv_bytes_in: int = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way, and no blocks are held for it."""
        return not (self.awaiting or self.sending or self.receiving)
