"""Keep only the tokens that a bit mask allows.

Owns the arithmetic of masks: a bit per token, as grammar engines write them, onto the logits of some rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 22  # logits worked on at once: bounds the temporaries


def keep_allowed_(logits_RV: Tensor, rows_N: Tensor, masks_NW: Tensor) -> None:
    """Set the logits of tokens that a row's mask does not allow to minus infinity, in place.

    Shapes: logits_RV [rows, vocabulary]; rows_N [N] int64, distinct rows; masks_NW [N, (vocabulary + 31) // 32] int32,
    bit ``i % 32`` of word ``i // 32`` is token i
    """
    vocab_size = logits_RV.shape[1]
    bits_32 = torch.arange(32, dtype=torch.int32, device=logits_RV.device)
    step = max(1, _CHUNK_ELEMENTS // vocab_size)
    for start in range(0, rows_N.shape[0], step):
        rows = rows_N[start : start + step]
        # An arithmetic shift keeps the sign, and the last bit is what is looked at.
        allowed_NV = ((masks_NW[start : start + step].unsqueeze(-1) >> bits_32) & 1).flatten(1)[:, :vocab_size]
        logits_RV[rows] = logits_RV[rows].masked_fill(allowed_NV == 0, float("-inf"))
