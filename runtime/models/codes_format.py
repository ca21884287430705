"""Weights that a checkpoint has quantized already: multiplied with as they are stored, where a GPU can do that.

Elsewhere, and where an option asks for another quantization, they become plain numbers for another format.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .linear_format import LinearFormat, Product
from .linear_format_gpu import kept_product
from .stored_weights import Codes


@dataclass(frozen=True, slots=True, kw_only=True)
class CodesFormat:
    """What is done with codes. ``keep``: no option asks for another quantization; ``one_way``: of any number of rows.

    ``dtype`` is the type of activations, and of what codes become where they are not kept.
    """

    dtype: torch.dtype
    device: torch.device
    keep: bool
    one_way: bool

    def prepare(self, codes: Codes, plain: LinearFormat, *, is_summed: bool) -> Product:
        """Take a weight; ``plain`` prepares it where it is not kept, and where sums over ranks have a fixed order."""
        if self.keep and self.dtype != torch.float32 and not (self.one_way and is_summed):
            product = kept_product(codes, device=self.device, one_way=self.one_way)
            if product is not None:
                return product
        return plain.prepare(codes.to(self.device).weight().to(self.dtype))
