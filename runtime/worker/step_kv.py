"""What a rank tells of the KV that its steps compute for other replicas.

Only steps with rows that are sent say anything (``StepPlan.sending_rows``). Called on the step thread, between kernels:
every call must be cheap, and none may wait.
"""

from __future__ import annotations

from typing import Protocol


class StepKv(Protocol):
    """Who sends a rank's KV on while it is computed."""

    def begin_step(self, numbers: list[int], blocks: list[list[int]], stops: list[int]) -> None:
        """Note what a step that now begins is going to compute: for transfer ``numbers[i]`` all positions before
        ``stops[i]``, which stand in ``blocks[i]``, the prompt's blocks from its first token on.

        Positions before the step's own are computed already, by earlier steps or another request that had them.
        """
        ...

    def layer_done(self, layer: int) -> None:
        """Note that the step's keys and values of a layer, as this rank counts them, are in their blocks.

        Layers come in order. Those of a step that cannot say so one by one are done when it ends.
        """
        ...

    def end_step(self) -> None:
        """Note that all layers of the step are done."""
        ...
