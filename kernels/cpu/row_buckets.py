"""Products in few shapes: rows in pieces of at most ``LARGEST``, each filled up to the next of a few sizes.

oneDNN makes code for every number of rows that it meets, and keeps it: a quarter of a megabyte and half a millisecond
each. A server meets every number. Pieces change no bits: a row of these products does not depend on the others.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LARGEST = 256


def bucket(rows: int) -> int:
    """Return the size that so many rows, at most ``LARGEST``, are filled up to: at most a quarter more, or 7 rows."""
    if rows <= 8:
        return rows
    step = 8 if rows <= 64 else 32
    return -(-rows // step) * step


def in_buckets(x_TI: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``multiply(x)``, computed in few shapes.

    Shapes: x_TI [tokens, inputs]; ``multiply`` takes [rows, inputs] to [rows, outputs]; returns [tokens, outputs]
    """
    rows = x_TI.shape[0]
    if rows <= LARGEST:
        return _filled(x_TI, multiply)
    return torch.cat([_filled(piece, multiply) for piece in x_TI.split(LARGEST)])


def _filled(x_TI: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
    rows, inputs = x_TI.shape
    size = bucket(rows)
    if size == rows:
        return multiply(x_TI)
    filled_TI = x_TI.new_zeros((size, inputs))
    filled_TI[:rows] = x_TI
    return multiply(filled_TI)[:rows]
