"""Memory that attention reuses from layer to layer and from step to step.

On a CPU, fresh large temporaries cost more in page faults than the copies they hold. One workspace belongs to
one decoder and is used by one step at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

# A share of the last-level cache: what is gathered is still there when it is multiplied.
GATHER_BYTES = 12 * 2**20

_Hidden = Callable[[Tensor, Tensor], Tensor]


class AttentionWorkspace:
    """Named buffers that grow to the largest size asked for, and the constant masks of prefill tiles."""

    def __init__(self, *, dtype: torch.dtype, device: torch.device) -> None:
        """Start without memory; every buffer will have this type and device."""
        self.dtype = dtype
        self.device = device
        self._buffers: dict[str, Tensor] = {}
        self._masks: dict[tuple[str, int, int], Tensor] = {}

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return a contiguous tensor with any contents; it is valid until ``name`` is taken again."""
        numbers = prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < numbers:
            buffer = torch.empty(numbers, dtype=self.dtype, device=self.device)
            self._buffers[name] = buffer
        return buffer[:numbers].view(tuple(shape))

    def future_mask(self, rows: int, columns: int) -> Tensor:
        """Return [rows, columns]: -inf where the column is above the row's number, else 0."""
        return self._mask("future", rows, columns, lambda row, column: column > row)

    def past_mask(self, rows: int, columns: int) -> Tensor:
        """Return [rows, columns]: -inf where column - (columns - rows) is below the row's number, else 0."""
        return self._mask("past", rows, columns, lambda row, column: column - (columns - rows) < row)

    def _mask(self, name: str, rows: int, columns: int, hidden: _Hidden) -> Tensor:
        mask = self._masks.get((name, rows, columns))
        if mask is None:
            row = torch.arange(rows, device=self.device).unsqueeze(1)
            column = torch.arange(columns, device=self.device).unsqueeze(0)
            mask = torch.zeros((rows, columns), dtype=self.dtype, device=self.device)
            mask.masked_fill_(hidden(row, column), float("-inf"))
            self._masks[(name, rows, columns)] = mask
        return mask
