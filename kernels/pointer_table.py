"""Tables of addresses, with which one launch reaches the memory of all layers.

A table is made once for the same tensors and stays on their device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .launch import jit, tl


@jit
def memory_at(table_ptr, TYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Return the memory at an address of a table, numbers of a type; the address is a multiple of ``ALIGNMENT``.

    Many bytes are read and written at once only where the compiler knows that.
    """
    return tl.multiple_of(tl.load(table_ptr).to(tl.pointer_type(TYPE)), [ALIGNMENT])


def pointer_table(tensors: Sequence[Tensor]) -> Tensor:
    """Return the addresses of tensors of one device, there.

    Shapes: returns [tensors] int64
    """
    return _table(tuple(tensor.data_ptr() for tensor in tensors), tensors[0].device)


@lru_cache(maxsize=64)
def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    # An address means the same whoever has it: an entry of memory that was given back does no harm.
    with torch.inference_mode(mode=False):
        return torch.tensor(addresses, dtype=torch.int64, device=device)
