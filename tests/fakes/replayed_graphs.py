"""Graphs on a CPU: what is captured is run again, on what stands at the places that it was captured with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from slipstream.runtime.worker.graph_backend import Pass


class ReplayedPass:
    """A pass whose result is always at the same place; as with CUDA's, capturing it computes nothing."""

    def __init__(self, run: Pass, backend: ReplayedGraphs) -> None:
        self._run = run
        self._backend = backend
        self._output: Tensor | None = None

    @property
    def output(self) -> Tensor:
        assert self._output is not None, "nothing has been replayed"
        return self._output

    def replay(self) -> None:
        self._backend.replays += 1
        result = self._run()
        if self._output is None:
            self._output = result
        else:
            self._output.copy_(result)


@dataclass
class ReplayedGraphs:
    """A backend as CUDA's; ``refuses`` has it fail as CUDA does where a pass waits for the device."""

    refuses: Callable[[], str | None] = lambda: None
    captures: int = 0
    replays: int = 0

    def capture(self, run: Pass) -> ReplayedPass:
        self.captures += 1
        if reason := self.refuses():
            raise RuntimeError(reason)
        return ReplayedPass(run, self)
