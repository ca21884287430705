"""The gated activation of every MLP here, and the same straight into 8-bit numbers.

Shapes: T tokens, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as functional
from torch import Tensor

from .backends import uses_triton
from .compile_case import CompileCase, pointer, targets_for
from .cpu.native import native_for
from .launch import KernelConfig, jit, launch, tl
from .quantize_rows import LARGEST, by_scale, quantize_rows, quantize_rows_reference, scale_of
from .tiles import rounded

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PLAIN = KernelConfig(tiles={"BLOCK": 1024}, num_warps=4, num_stages=1)
_QUANTIZED = KernelConfig(tiles={"BLOCK": 2048}, num_warps=8, num_stages=2)


def silu_and_mul_reference(gate_up_TI: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` for gate and up side by side; silu is rounded before it is multiplied.

    Shapes: gate_up_TI [..., 2 * size], gate first; returns [..., size]
    Source: SwiGLU (arXiv 2002.05202), section 2
    """
    gate_TI, up_TI = gate_up_TI.chunk(2, dim=-1)
    return functional.silu(gate_TI) * up_TI


def silu_and_mul_quantized_reference(gate_up_TI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return what ``silu_and_mul_reference`` gives as 8-bit numbers, and the scale of each row.

    Shapes: gate_up_TI [tokens, 2 * size]; dtype int8 or float8_e4m3fn; returns [tokens, size], [tokens, 1] float32
    """
    return quantize_rows_reference(silu_and_mul_reference(gate_up_TI), dtype)


@jit
def swiglu(gate, up, TYPE: tl.constexpr):
    """Return ``silu(gate) * up`` of float32 numbers, in ``TYPE``."""
    return rounded(rounded(gate / (1.0 + tl.exp(-gate)), TYPE).to(tl.float32) * up, TYPE)


@jit
def _silu_and_mul_kernel(gate_up_ptr, out_ptr, size, row_stride, BLOCK: tl.constexpr):
    """One program computes ``BLOCK`` numbers of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = columns < size
    gate_ptr = gate_up_ptr + row * row_stride
    gate = tl.load(gate_ptr + columns, mask=is_there, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + size + columns, mask=is_there, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * size + columns, swiglu(gate, up, out_ptr.dtype.element_ty), mask=is_there)


@jit
def _silu_and_mul_quantized_kernel(
    gate_up_ptr, out_ptr, scales_ptr, size, row_stride, LARGEST: tl.constexpr, BLOCK: tl.constexpr
):
    """One program computes one row, twice: for its scale, and, out of the cache by then, for its numbers."""
    row = tl.program_id(0).to(tl.int64)
    gate_ptr = gate_up_ptr + row * row_stride
    highest = tl.zeros((BLOCK,), tl.float32)
    broken = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, size, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        gate = tl.load(gate_ptr + columns, mask=columns < size, other=0.0).to(tl.float32)
        up = tl.load(gate_ptr + size + columns, mask=columns < size, other=0.0).to(tl.float32)
        value = swiglu(gate, up, gate_up_ptr.dtype.element_ty).to(tl.float32)
        highest = tl.maximum(highest, tl.abs(value))
        broken = broken | (value != value).to(tl.int32)
    scale = scale_of(tl.max(highest, axis=0), tl.max(broken, axis=0), LARGEST)
    tl.store(scales_ptr + row, scale)
    for first in range(0, size, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        gate = tl.load(gate_ptr + columns, mask=columns < size, other=0.0).to(tl.float32)
        up = tl.load(gate_ptr + size + columns, mask=columns < size, other=0.0).to(tl.float32)
        value = swiglu(gate, up, gate_up_ptr.dtype.element_ty).to(tl.float32)
        tl.store(out_ptr + row * size + columns, by_scale(value, scale, out_ptr.dtype.element_ty), mask=columns < size)


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``silu_and_mul`` and ``silu_and_mul_quantized`` launch."""
    numbers = dict.fromkeys(("size", "row_stride"), "i32")
    for dtype in _DTYPES:
        kind = pointer(dtype)
        yield CompileCase(
            kernel=_silu_and_mul_kernel,
            name=kind[1:],
            config=_PLAIN,
            signature={"gate_up_ptr": kind, "out_ptr": kind, **numbers},
            aligned=tuple(numbers),
        )
        for out_dtype in LARGEST:
            yield CompileCase(
                kernel=_silu_and_mul_quantized_kernel,
                name=f"{kind[1:]} to {pointer(out_dtype)[1:]}",
                config=_QUANTIZED,
                signature={"gate_up_ptr": kind, "out_ptr": pointer(out_dtype), "scales_ptr": "*fp32", **numbers},
                aligned=tuple(numbers),
                constants={"LARGEST": LARGEST[out_dtype]},
                targets=targets_for(out_dtype),
            )


def silu_and_mul(gate_up_TI: Tensor) -> Tensor:
    """As ``silu_and_mul_reference``.

    A row's bits do not depend on other rows with Triton or compiled kernels, and without them if ``size`` is a multiple
    of 32 times the threads: torch rounds values at the ragged end of a thread's share (which may lie within a row) in
    another way than the others.

    Raises: ValueError where gate and up are not of one size
    """
    size = _size_of(gate_up_TI)
    if gate_up_TI.dtype in _DTYPES and uses_triton("activation", gate_up_TI):
        rows_TI = gate_up_TI.reshape(-1, 2 * size) if size else gate_up_TI.new_empty(0, 0)
        out_TI = torch.empty((*gate_up_TI.shape[:-1], size), dtype=gate_up_TI.dtype, device=gate_up_TI.device)
        if rows_TI.stride(1) != 1:
            rows_TI = rows_TI.contiguous()
        launch(
            _silu_and_mul_kernel,
            (rows_TI.shape[0], -(-size // _PLAIN.tiles["BLOCK"])),
            _PLAIN,
            gate_up_ptr=rows_TI,
            out_ptr=out_TI,
            size=size,
            row_stride=rows_TI.stride(0),
        )
        return out_TI
    compiled = native_for(gate_up_TI)
    if compiled is not None and gate_up_TI.is_contiguous():
        out_TI = gate_up_TI.new_empty((*gate_up_TI.shape[:-1], size))
        rows, is_bfloat16 = out_TI.numel() // max(size, 1), gate_up_TI.dtype == torch.bfloat16
        compiled.silu_and_mul(
            gate_up_TI.data_ptr(), out_TI.data_ptr(), rows, size, is_bfloat16, torch.get_num_threads()
        )
        return out_TI
    gate_TI, up_TI = gate_up_TI.chunk(2, dim=-1)
    return functional.silu(gate_TI).mul_(up_TI)


def silu_and_mul_quantized(gate_up_TI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As ``silu_and_mul_quantized_reference``.

    Raises: ValueError for another type than int8 and float8_e4m3fn, or where gate and up are not of one size
    """
    size = _size_of(gate_up_TI)
    is_plain = gate_up_TI.dim() == 2 and gate_up_TI.stride(1) == 1 and gate_up_TI.dtype in _DTYPES
    if dtype not in LARGEST or not is_plain or not uses_triton("activation", gate_up_TI):
        return quantize_rows(silu_and_mul(gate_up_TI), dtype)
    out_TI = torch.empty(gate_up_TI.shape[0], size, dtype=dtype, device=gate_up_TI.device)
    scales_T1 = torch.empty(gate_up_TI.shape[0], 1, dtype=torch.float32, device=gate_up_TI.device)
    launch(
        _silu_and_mul_quantized_kernel,
        (gate_up_TI.shape[0],),
        _QUANTIZED,
        gate_up_ptr=gate_up_TI,
        out_ptr=out_TI,
        scales_ptr=scales_T1,
        size=size,
        row_stride=gate_up_TI.stride(0),
        LARGEST=LARGEST[dtype],
    )
    return out_TI, scales_T1


def _size_of(gate_up_TI: Tensor) -> int:
    if gate_up_TI.shape[-1] % 2:
        raise ValueError(f"gate_up holds gate and up side by side: {gate_up_TI.shape[-1]} is not twice a size")
    return gate_up_TI.shape[-1] // 2
