"""What an executor tells of a step whose KV goes to other replicas, layer by layer: the protocol, and nothing else."""

from __future__ import annotations

from typing import Protocol


class StepKv(Protocol):
    """Hears what is computed; called on the step thread, and never waits. Only in steps that have rows to be sent."""

    def begin_step(self, numbers: list[int], blocks: list[list[int]], stops: list[int]) -> None:
        """Note which rows of the step that begins are sent.

        ``numbers``: of this life's transfers, one a row. ``blocks``: of each row's sequence at this rank, from its
        first token, at least those before its stop. ``stops``: the position at which each row ends
        """
        ...

    def layer_done(self, layer: int) -> None:
        """Note that a layer, as this rank counts them, has written the KV of all rows that are sent.

        May be left out, where layers do not end one by one.
        """
        ...

    def end_step(self) -> None:
        """Note that all layers have."""
        ...
