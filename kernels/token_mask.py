"""Keep only the tokens that a bit mask allows.

Owns the arithmetic of masks: a bit per token, as grammar engines write them, onto the logits of some rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .backends import uses_triton
from .compile_case import CompileCase, pointer
from .launch import KernelConfig, jit, launch, tl

_CHUNK_ELEMENTS = 1 << 22  # logits worked on at once: bounds the temporaries
_CONFIG = KernelConfig(tiles={"WORDS": 64}, num_warps=4, num_stages=1)


def keep_allowed_reference(logits_RV: Tensor, rows_N: Tensor, masks_NW: Tensor) -> None:
    """Set the logits of tokens that a row's mask does not allow to minus infinity, in place.

    Shapes: logits_RV [rows, vocabulary]; rows_N [N] int64, distinct rows; masks_NW [N, (vocabulary + 31) // 32] int32,
    bit ``i % 32`` of word ``i // 32`` is token i
    """
    bits_32 = torch.arange(32, dtype=torch.int32, device=logits_RV.device)
    # An arithmetic shift keeps the sign, and the last bit is what is looked at.
    allowed_NV = ((masks_NW.unsqueeze(-1) >> bits_32) & 1).flatten(1)[:, : logits_RV.shape[1]]
    logits_RV[rows_N] = logits_RV[rows_N].masked_fill(allowed_NV == 0, float("-inf"))


@jit
def _keep_allowed_kernel(logits_ptr, rows_ptr, masks_ptr, vocabulary, words, row_stride, groups, WORDS: tl.constexpr):
    """One program writes -inf to what WORDS words of one row's mask do not allow; it reads no logits."""
    program = tl.program_id(0)
    place, group = program // groups, program % groups
    words_W = group * WORDS + tl.arange(0, WORDS)
    masks_W = tl.load(masks_ptr + place.to(tl.int64) * words + words_W, mask=words_W < words, other=-1)
    bits_B = tl.arange(0, 32)
    is_barred_WB = ((masks_W[:, None] >> bits_B[None, :]) & 1) == 0
    columns_WB = words_W[:, None] * 32 + bits_B[None, :]
    row_ptr = logits_ptr + tl.load(rows_ptr + place) * row_stride
    barred = tl.full((WORDS, 32), float("-inf"), tl.float32).to(logits_ptr.dtype.element_ty)
    tl.store(row_ptr + columns_WB, barred, mask=is_barred_WB & (columns_WB < vocabulary))


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``keep_allowed_`` launches."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        kind = pointer(dtype)
        yield CompileCase(
            kernel=_keep_allowed_kernel,
            name=kind[1:],
            config=_CONFIG,
            signature={
                "logits_ptr": kind,
                "rows_ptr": pointer(torch.int64),
                "masks_ptr": pointer(torch.int32),
                **dict.fromkeys(("vocabulary", "words", "row_stride", "groups"), "i32"),
            },
        )


def keep_allowed_(logits_RV: Tensor, rows_N: Tensor, masks_NW: Tensor) -> None:
    """As ``keep_allowed_reference``. Raises: ValueError for masks of another vocabulary"""
    vocabulary, words = logits_RV.shape[1], masks_NW.shape[1]
    if masks_NW.shape[0] != rows_N.shape[0] or words != -(-vocabulary // 32):
        raise ValueError(f"masks_NW is {list(masks_NW.shape)}: {rows_N.shape[0]} rows of {vocabulary} bits are needed")
    if uses_triton("sample", logits_RV) and logits_RV.stride(1) == 1:
        groups = -(-words // _CONFIG.tiles["WORDS"])
        launch(
            _keep_allowed_kernel,
            (rows_N.shape[0] * groups,),
            _CONFIG,
            logits_ptr=logits_RV,
            rows_ptr=rows_N,
            masks_ptr=masks_NW.contiguous(),
            vocabulary=vocabulary,
            words=words,
            row_stride=logits_RV.stride(0),
            groups=groups,
        )
        return
    step = max(1, _CHUNK_ELEMENTS // vocabulary)
    for start in range(0, rows_N.shape[0], step):
        keep_allowed_reference(logits_RV, rows_N[start : start + step], masks_NW[start : start + step])
