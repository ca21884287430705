"""A work without a group: it ends at a moment of a clock that only the test moves."""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.comm.errors import CommTimeout


class HandClock:
    """A clock that stands still unless it is moved."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


class ScriptedWork:
    """A work that ends ``lasts_s`` from now, in a tensor or in ``error``; waiting for it moves the clock there.

    ``log`` is told when it is waited for.
    """

    def __init__(
        self,
        clock: HandClock,
        lasts_s: float = 0.0,
        *,
        name: str = "",
        log: list[str] | None = None,
        error: Exception | None = None,
    ) -> None:
        self._clock = clock
        self._ends_s = clock() + lasts_s
        self._name = name
        self._log = [] if log is None else log
        self._error = error
        self.timeouts: list[float | None] = []

    def wait(self, timeout_s: float | None = None) -> Tensor:
        self._log.append(f"wait {self._name}")
        self.timeouts.append(timeout_s)
        left_s = max(0.0, self._ends_s - self._clock())
        if timeout_s is not None and left_s > timeout_s:
            self._clock.advance(timeout_s)
            raise CommTimeout(f"{self._name} took too long")
        self._clock.advance(left_s)
        if self._error is not None:
            raise self._error
        return torch.ones(1)

    def done(self) -> bool:
        return self._clock() >= self._ends_s
