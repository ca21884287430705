"""Memory that attention reuses from layer to layer and from step to step.

On a CPU, fresh large temporaries cost more in page faults than the copies they hold. One workspace belongs to
one decoder and is used by one step at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

# A share of the last-level cache: what is gathered is still there when it is multiplied.
GATHER_BYTES = 4 * 2**20


class AttentionWorkspace:
    """Named buffers that grow to the largest size asked for."""

    def __init__(self, *, dtype: torch.dtype, device: torch.device) -> None:
        """Start without memory; every buffer will have this type and device."""
        self.dtype = dtype
        self.device = device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return a contiguous tensor with any contents; it is valid until ``name`` is taken again."""
        numbers = prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < numbers:
            buffer = torch.empty(numbers, dtype=self.dtype, device=self.device)
            self._buffers[name] = buffer
        return buffer[:numbers].view(tuple(shape))
