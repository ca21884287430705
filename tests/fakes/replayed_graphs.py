"""Graphs on a CPU: what is captured is run again, on what stands at the places that it was captured with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from slipstream.runtime.worker.graph_backend import Pass


@dataclass
class ReplayedPass:
    """A pass whose result is always at the same place."""

    run: Pass
    output: Tensor
    backend: ReplayedGraphs

    def replay(self) -> None:
        self.backend.replays += 1
        self.output.copy_(self.run())


@dataclass
class ReplayedGraphs:
    """A backend as CUDA's; ``refuses`` has it fail as CUDA does where a pass waits for the device."""

    refuses: Callable[[], str | None] = lambda: None
    captures: int = 0
    replays: int = 0
    passes: list[ReplayedPass] = field(default_factory=list)

    def capture(self, run: Pass) -> ReplayedPass:
        self.captures += 1
        if reason := self.refuses():
            raise RuntimeError(reason)
        captured = ReplayedPass(run, run().clone(), self)
        # As after a capture: nothing has been computed.
        captured.output.fill_(float("nan"))
        self.passes.append(captured)
        return captured
