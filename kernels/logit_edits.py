"""Edits of single logits before a draw: bias, masks, penalties. Sparse: only the rows that ask pay.

Owns what an edit does, and the order of the four kinds. It must not know requests or slots.

Shapes: R rows, V vocabulary, E entries: a ragged list of (row, token) pairs
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .backends import uses_triton
from .compile_case import CompileCase, pointer
from .launch import KernelConfig, jit, launch, tl

_CONFIG = KernelConfig(tiles={"BLOCK": 256}, num_warps=4, num_stages=1)
_ADD, _PENALIZE, _PLACE = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class EditEntries:
    """Edits of one kind, on the host.

    Shapes: rows, token_ids [E] int64; amounts [E] float32
    """

    rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    token_ids: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    amounts: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitEdits:
    """What is edited before a draw, in the order in which it is: the functions below say what each kind does.

    ``mask`` has no use for its amounts.
    """

    bias: EditEntries
    mask: EditEntries
    repetition: EditEntries
    counts: EditEntries


@jit
def _edit_kernel(
    logits_ptr, rows_ptr, token_ids_ptr, amounts_ptr, edited_ptr, entries, row_stride, KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program edits BLOCK entries: adds the amounts (0), penalizes into a list (1), places the list's (2)."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_there = places < entries
    logit_ptrs = logits_ptr + tl.load(rows_ptr + places, mask=is_there, other=0) * row_stride
    logit_ptrs += tl.load(token_ids_ptr + places, mask=is_there, other=0)
    if KIND == 2:
        tl.store(logit_ptrs, tl.load(edited_ptr + places, mask=is_there, other=0.0), mask=is_there)
    else:
        logits = tl.load(logit_ptrs, mask=is_there, other=0.0)
        amounts = tl.load(amounts_ptr + places, mask=is_there, other=1.0)
        if KIND == 0:
            tl.store(logit_ptrs, logits + amounts, mask=is_there)
        else:
            penalized = tl.where(logits > 0, tl.div_rn(logits, amounts), logits * amounts)
            tl.store(edited_ptr + places, penalized, mask=is_there)


def compile_cases() -> Iterator[CompileCase]:
    """Return what the edits launch."""
    for name, kind in (("add", _ADD), ("penalize", _PENALIZE), ("place", _PLACE)):
        yield CompileCase(
            kernel=_edit_kernel,
            name=name,
            config=_CONFIG,
            signature={
                **dict.fromkeys(("logits_ptr", "amounts_ptr", "edited_ptr"), pointer(torch.float32)),
                **dict.fromkeys(("rows_ptr", "token_ids_ptr"), pointer(torch.int64)),
                **dict.fromkeys(("entries", "row_stride"), "i32"),
            },
            constants={"KIND": kind},
        )


def _takes(logits_RV: Tensor) -> bool:
    return uses_triton("sample", logits_RV) and logits_RV.dtype == torch.float32 and logits_RV.stride(1) == 1


def _edit(
    kind: int, logits_RV: Tensor, rows_E: Tensor, token_ids_E: Tensor, amounts_E: Tensor, edited_E: Tensor
) -> None:
    launch(
        _edit_kernel,
        (-(-rows_E.numel() // _CONFIG.tiles["BLOCK"]),),
        _CONFIG,
        logits_ptr=logits_RV,
        rows_ptr=rows_E.contiguous(),
        token_ids_ptr=token_ids_E.contiguous(),
        amounts_ptr=amounts_E.contiguous(),
        edited_ptr=edited_E,
        entries=rows_E.numel(),
        row_stride=logits_RV.stride(0),
        KIND=kind,
    )


def add_to_logits_(logits_RV: Tensor, rows_E: Tensor, token_ids_E: Tensor, amounts_E: Tensor) -> None:
    """Add an amount to single logits in place: logit_bias, and frequency and presence penalties as negative amounts.

    Shapes: logits_RV float32; rows_E, token_ids_E [E] int64, no pair twice; amounts_E [E] float32
    """
    if _takes(logits_RV):
        _edit(_ADD, logits_RV, rows_E, token_ids_E, amounts_E, amounts_E)
    else:
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
    if _takes(logits_RV):
        # In two launches: all logits are read before the first is written, so that none counts twice.
        edited_E = torch.empty(rows_E.shape, dtype=torch.float32, device=logits_RV.device)
        _edit(_PENALIZE, logits_RV, rows_E, token_ids_E, penalties_E, edited_E)
        _edit(_PLACE, logits_RV, rows_E, token_ids_E, penalties_E, edited_E)
        return
    logits_E = logits_RV[rows_E, token_ids_E]
    logits_RV[rows_E, token_ids_E] = torch.where(logits_E > 0, logits_E / penalties_E, logits_E * penalties_E)


def edit_logits_(logits_RV: Tensor, edits: LogitEdits) -> None:
    """Apply all kinds of edits in place, in their order; entries outside of the vocabulary are passed over.

    They go to the device in one copy. Shapes: logits_RV float32
    """
    kinds = [_inside(each, logits_RV.shape[1]) for each in (edits.bias, edits.mask, edits.repetition, edits.counts)]
    sizes = [each.rows.size for each in kinds]
    if not sum(sizes):
        return
    packed_3E = np.empty((3, sum(sizes)), np.int64)
    np.concatenate([each.rows for each in kinds], out=packed_3E[0])
    np.concatenate([each.token_ids for each in kinds], out=packed_3E[1])
    # A number of 32 bits for each, in the first half of its row.
    np.concatenate([each.amounts for each in kinds], out=packed_3E[2].view(np.float32)[: sum(sizes)])
    uploaded_3E = torch.from_numpy(packed_3E)
    if logits_RV.is_cuda:
        uploaded_3E = uploaded_3E.pin_memory().to(logits_RV.device, non_blocking=True)
    rows = uploaded_3E[0].split(sizes)
    token_ids = uploaded_3E[1].split(sizes)
    amounts = uploaded_3E[2].view(torch.float32)[: sum(sizes)].split(sizes)
    if sizes[0]:
        add_to_logits_(logits_RV, rows[0], token_ids[0], amounts[0])
    if sizes[1]:
        mask_tokens_(logits_RV, rows[1], token_ids[1])
    if sizes[2]:
        penalize_repetition_(logits_RV, rows[2], token_ids[2], amounts[2])
    if sizes[3]:
        add_to_logits_(logits_RV, rows[3], token_ids[3], amounts[3])


def _inside(entries: EditEntries, vocabulary: int) -> EditEntries:
    is_inside = (entries.token_ids >= 0) & (entries.token_ids < vocabulary)
    if is_inside.all():
        return entries
    return EditEntries(
        rows=entries.rows[is_inside], token_ids=entries.token_ids[is_inside], amounts=entries.amounts[is_inside]
    )
