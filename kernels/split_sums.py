"""Sums over splits: what several programs have multiplied, each a part of the inputs, added up in their order.

A product with few rows has too few tiles of outputs to keep a GPU busy, so its inputs are split. Each split writes its
own sums, and these are added one after the other: no atomic additions, the same bits each time.

Shapes: S splits, T rows, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .compile_case import CompileCase, pointer
from .launch import KernelConfig, jit, launch, next_power_of_2, tl
from .tiles import rounded

CONFIG = KernelConfig(tiles={"BLOCK": 512}, num_warps=4, num_stages=1)
_TARGET_PROGRAMS = 384
"""Programs that read weights side by side: three for each multiprocessor of a large GPU."""
_FEWEST_STEPS = 4
"""A split has so many steps at least, or its loads do not overlap."""


def split_sums_reference(
    parts_STO: Tensor,
    row_scales_T1: Tensor | None,
    output_scales_O: Tensor | None,
    bias_O: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``parts.sum(0) * row_scales * output_scales + bias``.

    Shapes: parts_STO [splits, rows, outputs] float32 or int32; scales float32; bias any float type
    """
    sums_TO = parts_STO.sum(0).float()
    if row_scales_T1 is not None and output_scales_O is not None:
        sums_TO = sums_TO * row_scales_T1 * output_scales_O
    return (sums_TO if bias_O is None else sums_TO + bias_O.float()).to(dtype)


@jit
def _split_sums_kernel(
    parts_ptr,
    row_scales_ptr,
    output_scales_ptr,
    bias_ptr,
    out_ptr,
    splits,
    outputs_16,
    part_stride_16,
    biases,
    HAS_SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program adds up a block of one row's outputs. ``biases``: how many there are, all or none."""
    row, outputs = tl.program_id(1).to(tl.int64), outputs_16 * 16
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_there = columns < outputs
    part_at = parts_ptr + row * outputs + columns
    total = tl.load(part_at, mask=is_there, other=0)
    for _ in range(1, splits):
        part_at += part_stride_16 * 16
        total += tl.load(part_at, mask=is_there, other=0)
    total = total.to(tl.float32)
    if HAS_SCALES:
        total = total * tl.load(row_scales_ptr + row) * tl.load(output_scales_ptr + columns, mask=is_there, other=0.0)
    total += tl.load(bias_ptr + columns, mask=columns < biases, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * outputs + columns, rounded(total, out_ptr.dtype.element_ty), mask=is_there)


def empty_outputs(x_TI: Tensor, outputs: int, dtype: torch.dtype) -> Tensor:
    """Return room for a product's outputs, filled up to a multiple of 16: then stores are known to be aligned.

    Shapes: returns [tokens, outputs filled up]
    """
    return torch.empty(x_TI.shape[0], outputs + -outputs % 16, dtype=dtype, device=x_TI.device)


_ONE_WAY_TILES = 64


def split_count(tiles: int, steps: int, *, one_way: bool = False) -> int:
    """Return into how many splits the ``steps`` of each of so many tiles go: a power of two, by the weight's shape.

    ``one_way``: by the steps alone, so that a rank with some of the outputs adds up as one with all of them does.
    """
    if one_way:
        tiles = _ONE_WAY_TILES
    wanted = min(_TARGET_PROGRAMS // max(1, tiles), steps // _FEWEST_STEPS)
    return 1 if wanted < 2 else next_power_of_2(wanted + 1) // 2


def split_sums_(
    out_TO: Tensor,
    parts_STO: Tensor,
    *,
    row_scales_T1: Tensor | None = None,
    output_scales_O: Tensor | None = None,
    bias_O: Tensor | None = None,
) -> None:
    """As ``split_sums_reference``, into ``out_TO``; by Triton.

    Shapes: out_TO [rows, outputs] contiguous, outputs as ``empty_outputs`` has them; parts_STO contiguous; as many
    output_scales_O at least; bias_O as many or fewer
    """
    splits, rows, outputs = parts_STO.shape
    launch(
        _split_sums_kernel,
        (-(-outputs // CONFIG.tiles["BLOCK"]), rows),
        CONFIG,
        parts_ptr=parts_STO,
        row_scales_ptr=out_TO if row_scales_T1 is None else row_scales_T1,
        output_scales_ptr=out_TO if output_scales_O is None else output_scales_O,
        bias_ptr=out_TO if bias_O is None else bias_O,
        out_ptr=out_TO,
        splits=splits,
        outputs_16=outputs // 16,
        part_stride_16=rows * (outputs // 16),
        biases=0 if bias_O is None else bias_O.shape[0],
        HAS_SCALES=row_scales_T1 is not None,
    )


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``split_sums_`` launches."""
    for parts, has_scales in ((torch.float32, False), (torch.float32, True), (torch.int32, True)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            scales = "*fp32" if has_scales else pointer(dtype)
            yield CompileCase(
                kernel=_split_sums_kernel,
                name=f"{pointer(parts)[1:]} to {pointer(dtype)[1:]}{' with scales' if has_scales else ''}",
                config=CONFIG,
                signature={
                    "parts_ptr": pointer(parts),
                    **dict.fromkeys(("row_scales_ptr", "output_scales_ptr"), scales),
                    **dict.fromkeys(("bias_ptr", "out_ptr"), pointer(dtype)),
                    **dict.fromkeys(("splits", "outputs_16", "part_stride_16", "biases"), "i32"),
                },
                constants={"HAS_SCALES": has_scales},
            )
