"""RMSNorm straight into 8-bit numbers, each row with a scale of its own: what a quantized product takes.

What comes out is what ``quantize_rows`` makes of ``rms_norm``, without its way through memory.

Shapes: T tokens, H normalized size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .backends import uses_triton
from .compile_case import CompileCase, pointer, targets_for
from .launch import KernelConfig, jit, launch, tl
from .norm import add_rms_norm, add_rms_norm_reference, norm_config, normalized, rms_norm, rms_norm_reference
from .quantize_rows import LARGEST, by_scale, quantize_rows, quantize_rows_reference, row_scale
from .tiles import rounded

_MAX_SIZE = 8192  # longer rows, with their sums, do not fit a program's registers


def rms_norm_quantized_reference(
    x_TH: Tensor, weight_H: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Normalize rows and quantize them; return (rows, scales).

    Shapes: x_TH [tokens, size]; weight_H [size]; dtype int8 or float8_e4m3fn; returns [tokens, size], [tokens, 1]
    float32
    """
    return quantize_rows_reference(rms_norm_reference(x_TH, weight_H, epsilon), dtype)


def add_rms_norm_quantized_reference(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Add ``x`` to the residual, normalize the sum and quantize that; return (rows, scales, new residual).

    Shapes: as of ``rms_norm_quantized_reference``; residual_TH as x_TH
    """
    normed_TH, total_TH = add_rms_norm_reference(x_TH, residual_TH, weight_H, epsilon)
    return *quantize_rows_reference(normed_TH, dtype), total_TH


@jit
def _quantized_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    total_ptr,
    out_ptr,
    scales_ptr,
    size,
    x_stride,
    epsilon,
    HAS_RESIDUAL: tl.constexpr,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program normalizes and quantizes one row (``ROWS`` is 1)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_there = columns < size
    x = tl.load(x_ptr + row * x_stride + columns, mask=is_there, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * size + columns, mask=is_there, other=0.0).to(tl.float32)
        total = rounded(x, total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * size + columns, total, mask=is_there)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=is_there, other=0.0).to(tl.float32)
    kind: tl.constexpr = x_ptr.dtype.element_ty
    normed = normalized(x, weight, size, epsilon, 0, kind, weight_ptr.dtype.element_ty).to(tl.float32)
    scale = row_scale(normed, LARGEST)
    tl.store(scales_ptr + row, scale)
    tl.store(out_ptr + row * size + columns, by_scale(normed, scale, out_ptr.dtype.element_ty), mask=is_there)


def _config(size: int) -> KernelConfig:
    return norm_config(max(4096, size), has_residual=True)


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``rms_norm_quantized`` and ``add_rms_norm_quantized`` launch."""
    for out_dtype in LARGEST:
        for size in (4096, 8192):
            for has_residual in (False, True):
                pointers = ("x_ptr", "residual_ptr", "weight_ptr", "total_ptr")
                yield CompileCase(
                    kernel=_quantized_norm_kernel,
                    name=f"{pointer(out_dtype)[1:]} {size}{' residual' if has_residual else ''}",
                    config=_config(size),
                    signature={
                        **dict.fromkeys(pointers, "*bf16"),
                        "out_ptr": pointer(out_dtype),
                        "scales_ptr": "*fp32",
                        **dict.fromkeys(("size", "x_stride"), "i32"),
                        "epsilon": "fp32",
                    },
                    aligned=("size", "x_stride"),
                    constants={"HAS_RESIDUAL": has_residual, "LARGEST": LARGEST[out_dtype]},
                    targets=targets_for(out_dtype),
                )


def _by_triton(x_TH: Tensor, weight_H: Tensor, dtype: torch.dtype) -> bool:
    # Of bfloat16, in which quantized models are served; others take two launches.
    are_alike = x_TH.dtype == weight_H.dtype == torch.bfloat16 and weight_H.shape == x_TH.shape[1:]
    is_plain = x_TH.dim() == 2 and x_TH.stride(1) == 1 and weight_H.is_contiguous()
    return are_alike and is_plain and dtype in LARGEST and x_TH.shape[1] <= _MAX_SIZE and uses_triton("norm", x_TH)


def _normalize(
    x_TH: Tensor, residual_TH: Tensor | None, weight_H: Tensor, total_TH: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    out_TH = torch.empty(x_TH.shape, dtype=dtype, device=x_TH.device)
    scales_T1 = torch.empty(x_TH.shape[0], 1, dtype=torch.float32, device=x_TH.device)
    launch(
        _quantized_norm_kernel,
        (x_TH.shape[0],),
        _config(x_TH.shape[1]),
        x_ptr=x_TH,
        residual_ptr=x_TH if residual_TH is None else residual_TH,
        weight_ptr=weight_H,
        total_ptr=total_TH,
        out_ptr=out_TH,
        scales_ptr=scales_T1,
        size=x_TH.shape[1],
        x_stride=x_TH.stride(0),
        epsilon=epsilon,
        HAS_RESIDUAL=residual_TH is not None,
        LARGEST=LARGEST[dtype],
    )
    return out_TH, scales_T1


def rms_norm_quantized(x_TH: Tensor, weight_H: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As ``rms_norm_quantized_reference``. Raises: ValueError for another type than int8 and float8_e4m3fn"""
    if _by_triton(x_TH, weight_H, dtype):
        return _normalize(x_TH, None, weight_H, x_TH, epsilon, dtype)
    return quantize_rows(rms_norm(x_TH, weight_H, epsilon), dtype)


def add_rms_norm_quantized(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``add_rms_norm_quantized_reference``. Raises: ValueError for another type than int8 and float8_e4m3fn"""
    are_alike = x_TH.shape == residual_TH.shape and x_TH.dtype == residual_TH.dtype
    if are_alike and residual_TH.is_contiguous() and _by_triton(x_TH, weight_H, dtype):
        total_TH = torch.empty(x_TH.shape, dtype=x_TH.dtype, device=x_TH.device)
        return *_normalize(x_TH, residual_TH, weight_H, total_TH, epsilon, dtype), total_TH
    normed_TH, total_TH = add_rms_norm(x_TH, residual_TH, weight_H, epsilon)
    return *quantize_rows(normed_TH, dtype), total_TH
