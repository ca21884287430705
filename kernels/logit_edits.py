"""Edits of single logits before a draw: bias, masks, penalties. Sparse: only the rows that ask pay.

Shapes: R rows, V vocabulary, E entries: a ragged list of (row, token) pairs
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def add_to_logits_(logits_RV: Tensor, rows_E: Tensor, token_ids_E: Tensor, amounts_E: Tensor) -> None:
    """Add an amount to single logits in place: logit_bias, and frequency and presence penalties as negative amounts.

    Shapes: logits_RV float32; rows_E, token_ids_E [E] int64, no pair twice; amounts_E [E] float32
    """
    logits_RV[rows_E, token_ids_E] += amounts_E


def mask_tokens_(logits_RV: Tensor, rows_E: Tensor, token_ids_E: Tensor) -> None:
    """Make tokens impossible in place, for instance the end tokens before ``min_tokens``.

    Shapes: logits_RV float32; rows_E, token_ids_E [E] int64
    """
    logits_RV[rows_E, token_ids_E] = -math.inf


def penalize_repetition_(logits_RV: Tensor, rows_E: Tensor, token_ids_E: Tensor, penalties_E: Tensor) -> None:
    """Divide positive logits by the penalty and multiply the others, in place; a pair that comes twice counts once.

    Shapes: logits_RV float32; rows_E, token_ids_E [E] int64; penalties_E [E] float32, one value within a row
    Source: CTRL (arXiv 1909.05858), section 4.1
    """
    logits_E = logits_RV[rows_E, token_ids_E]
    logits_RV[rows_E, token_ids_E] = torch.where(logits_E > 0, logits_E / penalties_E, logits_E * penalties_E)
