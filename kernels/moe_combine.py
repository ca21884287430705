"""The weighted sum of what a token's experts made of it, in the order of its choices.

Shapes: T tokens, H hidden size, A chosen experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .backends import uses_triton
from .compile_case import CompileCase, pointer
from .launch import KernelConfig, jit, launch, tl
from .tiles import rounded


def weighted_sum_reference(by_choice_TAH: Tensor, weights_TA: Tensor) -> Tensor:
    """Add up each token's results with their weights: in float32, first choice first; one rounding at the end.

    Shapes: by_choice_TAH [tokens, chosen, hidden] any float type; weights_TA [tokens, chosen] float32; returns
    [tokens, hidden] of by_choice's type
    Source: Mixtral (arXiv 2401.04088), section 2.1
    """
    total_TH = by_choice_TAH[:, 0].float() * weights_TA[:, :1]
    for choice in range(1, weights_TA.shape[1]):
        total_TH = total_TH + by_choice_TAH[:, choice].float() * weights_TA[:, choice : choice + 1]
    return total_TH.to(by_choice_TAH.dtype)


@jit
def _weighted_sum_kernel(by_choice_ptr, weights_ptr, out_ptr, chosen, hidden, BLOCK: tl.constexpr):
    """One program adds up BLOCK columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = column < hidden
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in range(chosen):
        row = token * chosen + choice
        weight = tl.load(weights_ptr + row)
        total += tl.load(by_choice_ptr + row * hidden + column, mask=is_there, other=0.0).to(tl.float32) * weight
    tl.store(out_ptr + token * hidden + column, rounded(total, out_ptr.dtype.element_ty), mask=is_there)


_TYPES = (torch.bfloat16, torch.float16, torch.float32)
CONFIG = KernelConfig(tiles={"BLOCK": 1024}, num_warps=4, num_stages=2)


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``weighted_sum`` launches."""
    for dtype in _TYPES:
        kind = pointer(dtype)
        yield CompileCase(
            kernel=_weighted_sum_kernel,
            name=kind[1:],
            config=CONFIG,
            signature={
                "by_choice_ptr": kind,
                "weights_ptr": "*fp32",
                "out_ptr": kind,
                "chosen": "i32",
                "hidden": "i32",
            },
        )


def weighted_sum(by_choice_TAH: Tensor, weights_TA: Tensor) -> Tensor:
    """As ``weighted_sum_reference``. Raises: ValueError where shapes do not fit"""
    tokens, chosen, hidden = by_choice_TAH.shape
    if weights_TA.shape != (tokens, chosen) or chosen == 0:
        raise ValueError(f"weights_TA must be {[tokens, chosen]}, at least one a token, got {list(weights_TA.shape)}")
    if by_choice_TAH.dtype in _TYPES and uses_triton("moe_combine", by_choice_TAH):
        out_TH = torch.empty((tokens, hidden), dtype=by_choice_TAH.dtype, device=by_choice_TAH.device)
        launch(
            _weighted_sum_kernel,
            (tokens, -(-hidden // CONFIG.tiles["BLOCK"])),
            CONFIG,
            by_choice_ptr=by_choice_TAH.contiguous(),
            weights_ptr=weights_TA.contiguous(),
            out_ptr=out_TH,
            chosen=chosen,
            hidden=hidden,
        )
        return out_TH
    total_TH = by_choice_TAH[:, 0].float() * weights_TA[:, :1]
    for choice in range(1, chosen):
        total_TH.addcmul_(by_choice_TAH[:, choice].float(), weights_TA[:, choice : choice + 1])
    return total_TH.to(by_choice_TAH.dtype)
