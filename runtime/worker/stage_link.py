"""What a pipeline stage exchanges with the others: hidden states go to the next one, drawn tokens come back to all.

Sends are not waited for: their tensors are kept until they have left. Tokens are waited for when a step needs them, and
not before, so that a stage works on other sequences while the last one draws. One thread uses it, in the steps' order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...comm.collectives import Collectives, Work
from ..clock import monotonic_clock
from ..messages import Int32Array

_MOST_SENDS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnRows:
    """Where tokens that were drawn belong.

    Shapes: slots, positions, token_ids [rows]
    """

    slots: Int32Array
    positions: NDArray[np.int64]
    token_ids: Int32Array


@dataclass(frozen=True, slots=True, kw_only=True)
class _Expected:
    slots: Int32Array
    positions: NDArray[np.int64]
    work: Work


class StageLink:
    """One rank's connections along the pipeline; the group's ranks are the stages, first one first."""

    def __init__(self, group: Collectives, *, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._group = group
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._device = device
        self._sends: deque[Work] = deque()
        self._expected: deque[_Expected] = deque()
        self.waited_s = 0.0
        """How long this rank has waited for other stages in all."""

    def receive_hidden(self, tokens: int) -> Tensor:
        """Return the hidden states of a step from the stage before.

        Shapes: returns [tokens, hidden size]
        """
        out_TH = torch.empty((tokens, self._hidden_size), dtype=self._dtype, device=self._device)
        return self._wait(self._group.receive(out_TH, source=self._group.rank - 1))

    def send_hidden(self, hidden_TH: Tensor) -> None:
        """Send a step's hidden states to the next stage."""
        self._keep(self._group.send(hidden_TH.contiguous(), to=self._group.rank + 1))

    def send_tokens(self, token_ids: Int32Array) -> None:
        """Send what the last stage has drawn to all others."""
        tokens = torch.from_numpy(np.ascontiguousarray(token_ids)).to(self._device)
        for stage in range(self._group.size - 1):
            self._keep(self._group.send(tokens, to=stage))

    def expect_tokens(self, slots: Int32Array, positions: NDArray[np.int64]) -> None:
        """Be ready for the tokens that the last stage will draw for these slots, to stand at these positions."""
        out = torch.empty(len(slots), dtype=torch.int32, device=self._device)
        work = self._group.receive(out, source=self._group.size - 1)
        self._expected.append(_Expected(slots=slots, positions=positions, work=work))

    def settle(self, slots: Int32Array) -> Iterator[DrawnRows]:
        """Wait for the tokens of the last step that any of these slots takes part in, and of all steps before it."""
        needed = 0
        for place, expected in enumerate(self._expected):
            if np.isin(expected.slots, slots).any():
                needed = place + 1
        for _ in range(needed):
            expected = self._expected.popleft()
            token_ids = self._wait(expected.work).cpu().numpy()
            yield DrawnRows(slots=expected.slots, positions=expected.positions, token_ids=token_ids)

    def _keep(self, work: Work) -> None:
        self._sends.append(work)
        while self._sends and (self._sends[0].done() or len(self._sends) > _MOST_SENDS):
            self._wait(self._sends.popleft())

    def _wait(self, work: Work) -> Tensor:
        start_s = monotonic_clock()
        try:
            return work.wait()
        finally:
            self.waited_s += monotonic_clock() - start_s
