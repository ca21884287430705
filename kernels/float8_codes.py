"""Weights as float8 numbers, as checkpoints have them: e4m3 with scales by output, or by block of inputs.

Shapes: O outputs, I inputs, B blocks of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Float8Codes:
    """A weight of float8 numbers: input i of output o is ``values[o, i] * scales[o, i // block]``.

    Shapes: values_OI [outputs, inputs] float8_e4m3fn; scales_OB [outputs, blocks] float32, the last block perhaps cut
    """

    values_OI: Tensor
    scales_OB: Tensor
    block: int

    @property
    def has_one_scale(self) -> bool:
        """Whether each output has one scale for all of its inputs."""
        return self.scales_OB.shape[1] == 1

    def to(self, device: torch.device) -> Float8Codes:
        """Return the same on a device."""
        return Float8Codes(values_OI=self.values_OI.to(device), scales_OB=self.scales_OB.to(device), block=self.block)

    def weight(self) -> Tensor:
        """Return what the numbers stand for.

        Shapes: returns [outputs, inputs] float32
        """
        inputs = self.values_OI.shape[1]
        return self.values_OI.float() * self.scales_OB.repeat_interleave(self.block, dim=1)[:, :inputs]


def concatenated(parts: list[Float8Codes]) -> Float8Codes:
    """Return several weights of the same inputs as one, their outputs one after the other.

    Raises: ValueError when their blocks differ
    """
    blocks = {part.block for part in parts}
    if len(blocks) > 1:
        raise ValueError(f"weights in blocks of {sorted(blocks)} inputs cannot be one")
    return Float8Codes(
        # Not every device can concatenate float8 numbers.
        values_OI=torch.cat([part.values_OI.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn),
        scales_OB=torch.cat([part.scales_OB for part in parts]),
        block=parts[0].block,
    )
