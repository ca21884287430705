"""Where a request may go: to one replica, or its prompt to one and its tokens to another. Values only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """One replica computes the prompt and draws the tokens."""

    replica: str

    @property
    def replicas(self) -> tuple[str, ...]:
        """Everybody who has to do with it."""
        return (self.replica,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """``prefill`` computes the prompt and sends its KV; ``decode`` draws the tokens."""

    prefill: str
    decode: str

    @property
    def replicas(self) -> tuple[str, ...]:
        """Everybody who has to do with it."""
        return (self.prefill, self.decode)


Route = Whole | Split
