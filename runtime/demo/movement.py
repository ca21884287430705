"""What a server's metrics say of keys and values that went from one replica to another. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_HAND_OFFS = 'slipstream_hand_offs_total{ending="committed"}'
_BYTES = "slipstream_kv_bytes_moved_total"
_WIRE_S = "slipstream_kv_wire_seconds_total"
_HIDDEN_S = "slipstream_kv_hidden_seconds_total"


@dataclass(frozen=True, slots=True, kw_only=True)
class Movement:
    """What was moved between two looks. ``hand_offs``: those that came to their end.

    ``hidden_s``: the part of ``wire_s``, the time with KV on its way, in which prompts were still being computed.
    """

    hand_offs: int = 0
    kv_bytes: int = 0
    wire_s: float = 0.0
    hidden_s: float = 0.0

    @property
    def hidden_share(self) -> float | None:
        """The share of the movement that was hidden behind prefill; None of nothing."""
        return self.hidden_s / self.wire_s if self.wire_s > 0 else None


def movement(before: Mapping[str, float], after: Mapping[str, float]) -> Movement:
    """Return what was moved between two readings of a server's metrics."""

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    return Movement(
        hand_offs=round(grown(_HAND_OFFS)),
        kv_bytes=round(grown(_BYTES)),
        wire_s=grown(_WIRE_S),
        hidden_s=grown(_HIDDEN_S),
    )
