"""How long KV was on its way, and how much of that was hidden behind computing the prompt. Pure: time is an argument.

A transfer is on the wire from when its first frame was posted until none is outstanding; where frames of several layers
overlap, that counts once. What lies before the end of the prompt's last step is hidden: nobody waited for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...comm.kv.transfer import TransferId


@dataclass(slots=True)
class WireTime:
    """Of one generation of a transfer at one rank. ``tokens``: of the prompt, ``computed``: by steps that have ended.

    Units: sent_bytes, that went out; wire_s and hidden_s as ``RankMoved`` has them
    """

    generation: int
    tokens: int
    computed: int = 0
    sent_bytes: int = 0
    wire_s: float = 0.0
    hidden_s: float = 0.0
    outstanding: int = 0
    since_s: float = 0.0


class WireTimes:
    """All transfers from a rank that are open."""

    def __init__(self) -> None:
        self._times: dict[TransferId, WireTime] = {}

    def open(self, transfer: TransferId, generation: int, *, tokens: int) -> None:
        """Begin with a generation of a prompt of so many tokens."""
        self._times[transfer] = WireTime(generation, tokens)

    def posted(self, now_s: float, transfer: TransferId) -> None:
        """Note that a frame is on its way."""
        one = self._times[transfer]
        if not one.outstanding:
            one.since_s = now_s
        one.outstanding += 1

    def released(self, now_s: float, transfer: TransferId, sent_bytes: int) -> None:
        """Note that a frame is on its way no longer; ``sent_bytes`` is 0 of one that did not go out."""
        one = self._times[transfer]
        one.outstanding -= 1
        one.sent_bytes += sent_bytes
        if not one.outstanding:
            one.wire_s += now_s - one.since_s

    def computed(self, at_s: float, transfer: TransferId, tokens: int) -> None:
        """Note that a step has ended, a moment ago at most, and how far the prompt is now; its last one counts."""
        one = self._times.get(transfer)
        if one is not None:
            one.computed = tokens
            one.hidden_s = one.wire_s + (max(at_s - one.since_s, 0.0) if one.outstanding else 0.0)

    def take(self, transfer: TransferId, generation: int) -> WireTime | None:
        """Return what is known of a generation, once."""
        one = self._times.get(transfer)
        if one is None or one.generation != generation or one.outstanding:
            return None
        if one.computed < one.tokens:
            # The last layer was sent before its step was over.
            one.hidden_s = one.wire_s
        return self._times.pop(transfer)
