"""Rows of 8-bit numbers, float8 or integers, each row with a scale of its own: activations as they come.

A row's bits depend on nothing but the row.

Shapes: T rows, H numbers of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import uses_triton
from .compile_case import CompileCase, pointer, targets_for
from .launch import KernelConfig, jit, launch, next_power_of_2, tl
from .tiles import rounded

LARGEST: Mapping[torch.dtype, float] = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest number of a row, by type; the most that float8 has, and of integers what has a negative."""

MAX_SIZE = 16384
"""The longest rows that a program holds."""

_DTYPES = (torch.bfloat16, torch.float16)  # of activations that are quantized on a GPU
_SMALLEST_SCALE = 1e-12


def quantize_rows_reference(x_TH: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return rows as 8-bit numbers, and the scales that they have to be multiplied with.

    Shapes: x_TH [rows, size] any float type; dtype int8 or float8_e4m3fn; returns [rows, size], [rows, 1] float32
    Source: symmetric per-row quantization (arXiv 2004.09602, sections 3.2 and 4.1)
    """
    largest = _largest(dtype)
    x32_TH = x_TH.float()
    highest_T1 = x32_TH.abs().amax(1, keepdim=True) if x_TH.shape[1] else x32_TH.new_zeros(x_TH.shape[0], 1)
    scales_T1 = torch.div(highest_T1, torch.full_like(highest_T1, largest)).clamp_min_(_SMALLEST_SCALE)
    quotients_TH = x32_TH * (1 / scales_T1)
    if dtype == torch.int8:
        quotients_TH = quotients_TH.round().nan_to_num(0)
    return quotients_TH.clamp(-largest, largest).to(dtype), scales_T1


def _largest(dtype: torch.dtype) -> float:
    if dtype not in LARGEST:
        raise ValueError(f"rows are quantized to {' or '.join(map(str, LARGEST))}, not to {dtype}")
    return LARGEST[dtype]


@jit
def row_scale(x, LARGEST: tl.constexpr):
    """Return the scale of a row of float32 numbers; it is no number if one of the row's is none."""
    return scale_of(tl.max(tl.abs(x), axis=0), tl.max((x != x).to(tl.int32), axis=0), LARGEST)


@jit
def scale_of(highest, broken, LARGEST: tl.constexpr):
    """Return the scale of a row from its highest number, and whether (1, 0) one of them is none."""
    scale = tl.maximum(tl.div_rn(highest, LARGEST), 1e-12)
    return tl.where(broken > 0, float("nan"), scale)


@jit
def by_scale(x, scale, TYPE: tl.constexpr):
    """Return float32 numbers as 8-bit ones of a scale."""
    x = x * tl.div_rn(1.0, scale)
    if tl.int8 == TYPE:
        # Adding 1.5 * 2^23 rounds to an integer, ties to even.
        x = tl.where(x == x, (x + 12582912.0) - 12582912.0, 0.0)
        return tl.minimum(tl.maximum(x, -127.0), 127.0).to(tl.int8)
    return rounded(x, TYPE)


@jit
def _quantize_rows_kernel(x_ptr, out_ptr, scales_ptr, size, x_stride, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """One program quantizes one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_there = columns < size
    x = tl.load(x_ptr + row * x_stride + columns, mask=is_there, other=0.0).to(tl.float32)
    scale = row_scale(x, LARGEST)
    tl.store(scales_ptr + row, scale)
    tl.store(out_ptr + row * size + columns, by_scale(x, scale, out_ptr.dtype.element_ty), mask=is_there)


def quantize_config(size: int) -> KernelConfig:
    """Return how rows of a size are quantized: a row at once."""
    block = max(4096, next_power_of_2(size))
    return KernelConfig(tiles={"BLOCK": block}, num_warps=min(16, block // 512), num_stages=1)


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``quantize_rows`` launches."""
    for dtype in _DTYPES:
        for out_dtype in LARGEST:
            for size in (4096, 8192, 16384):
                yield CompileCase(
                    kernel=_quantize_rows_kernel,
                    name=f"{pointer(dtype)[1:]} to {pointer(out_dtype)[1:]} {size}",
                    config=quantize_config(size),
                    signature={
                        "x_ptr": pointer(dtype),
                        "out_ptr": pointer(out_dtype),
                        "scales_ptr": "*fp32",
                        "size": "i32",
                        "x_stride": "i32",
                    },
                    aligned=("size", "x_stride"),
                    constants={"LARGEST": LARGEST[out_dtype]},
                    targets=targets_for(out_dtype),
                )


@dataclass(frozen=True, slots=True)
class ByteRows:
    """Rows as 8-bit numbers, each with a scale; ``dtype`` is the type of the numbers that they were.

    Shapes: values_TH [tokens, size] int8 or float8_e4m3fn; scales_T1 [tokens, 1] float32
    """

    values_TH: Tensor
    scales_T1: Tensor
    dtype: torch.dtype


def quantize_rows(x_TH: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As ``quantize_rows_reference``.

    Raises: ValueError for another type than int8 and float8_e4m3fn
    """
    largest, size = _largest(dtype), x_TH.shape[1]
    if x_TH.dtype not in _DTYPES or size > MAX_SIZE or not uses_triton("quantize_rows", x_TH):
        return quantize_rows_reference(x_TH, dtype)
    if x_TH.stride(1) != 1:
        x_TH = x_TH.contiguous()
    out_TH = torch.empty(x_TH.shape, dtype=dtype, device=x_TH.device)
    scales_T1 = torch.empty(x_TH.shape[0], 1, dtype=torch.float32, device=x_TH.device)
    launch(
        _quantize_rows_kernel,
        (x_TH.shape[0],),
        quantize_config(size),
        x_ptr=x_TH,
        out_ptr=out_TH,
        scales_ptr=scales_T1,
        size=size,
        x_stride=x_TH.stride(0),
        LARGEST=largest,
    )
    return out_TH, scales_T1
