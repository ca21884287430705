"""Root-mean-square normalization, alone and with the residual addition before it.

Shapes: T tokens, H normalized size; a weight may have further axes that broadcast (one weight per head).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from .backends import uses_triton
from .compile_case import CompileCase, pointer
from .cpu.native import Native, native_for
from .launch import KernelConfig, jit, launch, next_power_of_2, tl
from .tiles import rounded


def rms_norm_reference(x_TH: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    """Normalize the last axis: the variance is taken in float32, the weight is multiplied in its own type.

    So a weight of float32 beside numbers of 16 bits is multiplied before anything is rounded.

    Shapes: x_TH [..., size] any float type; weight_H [size], or [heads, size] for x [tokens, heads, size], of the same
    type or float32
    Source: RMSNorm (arXiv 1910.07467), equation 4
    """
    variance_T1 = x_TH.float().square().mean(-1, keepdim=True)
    scaled_TH = (x_TH.float() * torch.rsqrt(variance_T1 + epsilon)).to(weight_H.dtype)
    return (scaled_TH * weight_H).to(x_TH.dtype)


@jit
def normalized(x, weight, size, epsilon, AXIS: tl.constexpr, TYPE: tl.constexpr, WEIGHT_TYPE: tl.constexpr):
    """Return float32 rows normalized and multiplied with a weight that is of ``WEIGHT_TYPE`` in memory, in ``TYPE``.

    Zeros stand behind a row's end.
    """
    scale = tl.rsqrt(tl.sum(x * x, axis=AXIS, keep_dims=True) / size + epsilon)
    return rounded(rounded(x * scale, WEIGHT_TYPE).to(tl.float32) * weight, TYPE)


@jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    total_ptr,
    out_ptr,
    rows,
    heads,
    size,
    x_token_stride,
    x_head_stride,
    out_token_stride,
    out_head_stride,
    weight_stride,
    epsilon,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program normalizes ``ROWS`` rows, each a token's or one of its heads'. The output may be the input."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    is_there = columns < size
    if ROWS > 1:
        row = (row * ROWS + tl.arange(0, ROWS))[:, None]
        is_there = is_there & (row < rows)
    token, head = (row // heads).to(tl.int64), row % heads
    x = tl.load(x_ptr + token * x_token_stride + head * x_head_stride + columns, mask=is_there, other=0.0)
    x = x.to(tl.float32)
    if HAS_RESIDUAL:
        plain = row.to(tl.int64) * size + columns
        x += tl.load(residual_ptr + plain, mask=is_there, other=0.0).to(tl.float32)
        total = rounded(x, total_ptr.dtype.element_ty)
        tl.store(total_ptr + plain, total, mask=is_there)
        # What is normalized is the sum as it is kept.
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + head * weight_stride + columns, mask=is_there, other=0.0).to(tl.float32)
    out = normalized(
        x, weight, size, epsilon, 1 if ROWS > 1 else 0, out_ptr.dtype.element_ty, weight_ptr.dtype.element_ty
    )
    tl.store(out_ptr + token * out_token_stride + head * out_head_stride + columns, out, mask=is_there)


MAX_SIZE = 16384
"""The longest rows that a program holds."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_WIDE = (torch.bfloat16, torch.float32)
"""Types of rows and of a weight that is multiplied before they are rounded; float16 goes by torch's operations."""


def norm_config(size: int, *, has_residual: bool = False) -> KernelConfig:
    """Return how rows of a size are normalized: some 16 numbers a thread, short rows several at once."""
    block = next_power_of_2(size)
    block = max(1024, block) if has_residual or block > 256 else max(128, block)
    numbers = max(1024, block)
    return KernelConfig(
        tiles={"ROWS": numbers // block, "BLOCK": block}, num_warps=min(16, numbers // 512), num_stages=1
    )


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``rms_norm`` and ``add_rms_norm`` launch."""
    pointers = ("x_ptr", "residual_ptr", "weight_ptr", "total_ptr", "out_ptr")
    numbers = ("rows", "heads", "size", "weight_stride")
    strides = ("x_token_stride", "x_head_stride", "out_token_stride", "out_head_stride")
    for dtype, weight_dtype in (*((dtype, dtype) for dtype in _DTYPES), _WIDE):
        kind, weight_kind = pointer(dtype), pointer(weight_dtype)
        for size in (128, 256, 1024, 2048, 4096, 8192, 16384):
            for has_residual in (False, True) if size > 256 else (False,):
                yield CompileCase(
                    kernel=_rms_norm_kernel,
                    name=f"{kind[1:]}{'' if kind == weight_kind else ' by fp32'} {size}{' residual' * has_residual}",
                    config=norm_config(size, has_residual=has_residual),
                    signature={
                        **dict.fromkeys(pointers, kind),
                        "weight_ptr": weight_kind,
                        **dict.fromkeys((*numbers, *strides), "i32"),
                        "epsilon": "fp32",
                    },
                    constants={"HAS_RESIDUAL": has_residual},
                    aligned=("size", "weight_stride", *strides),
                )


def _by_triton(x_TH: Tensor, weight_H: Tensor) -> bool:
    is_alike = weight_H.dtype == x_TH.dtype or (x_TH.dtype, weight_H.dtype) == _WIDE
    is_plain = x_TH.dim() in (2, 3) and x_TH.stride(-1) == 1 and x_TH.dtype in _DTYPES
    fits = x_TH.shape[-1] <= MAX_SIZE and weight_H.shape in (x_TH.shape[-1:], x_TH.shape[1:])
    return is_alike and weight_H.is_contiguous() and is_plain and fits and uses_triton("norm", x_TH)


def _normalize_by_triton(
    x_TH: Tensor, residual_TH: Tensor | None, weight_H: Tensor, total_TH: Tensor | None, out_TH: Tensor, epsilon: float
) -> None:
    size = x_TH.shape[-1]
    has_heads = x_TH.dim() == 3
    rows = x_TH.numel() // max(size, 1)
    config = norm_config(size, has_residual=residual_TH is not None)
    launch(
        _rms_norm_kernel,
        (-(-rows // config.tiles["ROWS"]),),
        config,
        x_ptr=x_TH,
        residual_ptr=x_TH if residual_TH is None else residual_TH,
        weight_ptr=weight_H,
        total_ptr=out_TH if total_TH is None else total_TH,
        out_ptr=out_TH,
        rows=rows,
        heads=x_TH.shape[1] if has_heads else 1,
        size=size,
        x_token_stride=x_TH.stride(0),
        x_head_stride=x_TH.stride(1) if has_heads else 0,
        out_token_stride=out_TH.stride(0),
        out_head_stride=out_TH.stride(1) if has_heads else 0,
        weight_stride=size if weight_H.dim() == 2 else 0,
        epsilon=epsilon,
        HAS_RESIDUAL=residual_TH is not None,
    )


def rms_norm(x_TH: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    """As ``rms_norm_reference``."""
    if _by_triton(x_TH, weight_H):
        out_TH = torch.empty(x_TH.shape, dtype=x_TH.dtype, device=x_TH.device)
        _normalize_by_triton(x_TH, None, weight_H, None, out_TH, epsilon)
        return out_TH
    compiled = native_for(x_TH)
    if compiled is not None and x_TH.dim() in (2, 3) and x_TH.stride(-1) == 1 and _is_weight(weight_H, x_TH):
        heads = x_TH.shape[1] if x_TH.dim() == 3 else 1
        if heads == 1 or x_TH.stride(1) == x_TH.shape[-1]:
            out_TH = x_TH.new_empty(x_TH.shape)
            _normalize(compiled, x_TH, None, weight_H, None, out_TH, epsilon)
            return out_TH
    # The norm reads x once and leaves no squares; addcmul makes the variance of it and adds epsilon.
    norm_T1 = torch.linalg.vector_norm(x_TH, dim=-1, keepdim=True, dtype=torch.float32)
    scale_T1 = torch.addcmul(_scalar(epsilon, x_TH.device), norm_T1, norm_T1, value=1 / x_TH.shape[-1]).rsqrt_()
    # A product with float32 is float32.
    return (x_TH * scale_T1).to(weight_H.dtype).mul_(weight_H).to(x_TH.dtype)


def normalize_heads_(x_THD: Tensor, weight_HD: Tensor, epsilon: float) -> None:
    """As ``rms_norm``, in place.

    Shapes: x_THD [tokens, heads, size], heads side by side; weight_HD [heads, size]
    """
    if _by_triton(x_THD, weight_HD):
        _normalize_by_triton(x_THD, None, weight_HD, None, x_THD, epsilon)
        return
    compiled = native_for(x_THD)
    if compiled is not None and x_THD.stride(1) == x_THD.shape[-1] and _is_weight(weight_HD, x_THD):
        _normalize(compiled, x_THD, None, weight_HD, None, x_THD, epsilon)
    else:
        x_THD.copy_(rms_norm(x_THD, weight_HD, epsilon))


def _is_weight(weight_H: Tensor, x_TH: Tensor) -> bool:
    """Return whether the compiled norm takes a weight: it trusts what it is given."""
    shapes = (x_TH.shape[-1:], x_TH.shape[1:])
    return weight_H.dtype in (x_TH.dtype, torch.float32) and weight_H.is_contiguous() and weight_H.shape in shapes


def _normalize(
    compiled: Native,
    x_TH: Tensor,
    residual_TH: Tensor | None,
    weight_H: Tensor,
    total_TH: Tensor | None,
    out_TH: Tensor,
    epsilon: float,
) -> None:
    size = x_TH.shape[-1]
    compiled.rms_norm(
        x_TH.data_ptr(),
        None if residual_TH is None else residual_TH.data_ptr(),
        weight_H.data_ptr(),
        None if total_TH is None else total_TH.data_ptr(),
        out_TH.data_ptr(),
        x_TH.shape[0],
        x_TH.shape[1] if x_TH.dim() == 3 else 1,
        size,
        x_TH.stride(0),
        out_TH.stride(0),
        size if weight_H.dim() == 2 else 0,
        epsilon,
        x_TH.dtype == torch.bfloat16,
        weight_H.dtype != x_TH.dtype,
        torch.get_num_threads(),
    )


@lru_cache(maxsize=64)
def _scalar(value: float, device: torch.device) -> Tensor:
    # Made once: with few tokens, an operation takes as long as its call.
    with torch.inference_mode(mode=False):
        return torch.full((), value, dtype=torch.float32, device=device)


def add_rms_norm_reference(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Add ``x`` to the residual and normalize the sum, as it is kept; return (normalized, new residual).

    Shapes: x_TH, residual_TH [tokens, size], same float type; weight_H [size]
    """
    total_TH = residual_TH + x_TH
    return rms_norm_reference(total_TH, weight_H, epsilon), total_TH


def add_rms_norm(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """As ``add_rms_norm_reference``."""
    is_plain = x_TH.dim() == 2 and x_TH.is_contiguous() and residual_TH.is_contiguous()
    are_alike = x_TH.shape == residual_TH.shape and x_TH.dtype == residual_TH.dtype
    if is_plain and are_alike and weight_H.dim() == 1 and _by_triton(x_TH, weight_H):
        total_TH, out_TH = torch.empty_like(x_TH), torch.empty_like(x_TH)
        _normalize_by_triton(x_TH, residual_TH, weight_H, total_TH, out_TH, epsilon)
        return out_TH, total_TH
    compiled = native_for(x_TH)
    if compiled is not None and is_plain and are_alike and weight_H.dim() == 1 and _is_weight(weight_H, x_TH):
        total_TH, out_TH = torch.empty_like(x_TH), torch.empty_like(x_TH)
        _normalize(compiled, x_TH, residual_TH, weight_H, total_TH, out_TH, epsilon)
        return out_TH, total_TH
    residual_TH = residual_TH + x_TH
    return rms_norm(residual_TH, weight_H, epsilon), residual_TH
