"""Gated activations of all kinds that MLPs here have; SwiGLU, by far the most frequent, is ``activation``.

Shapes: T tokens, I intermediate size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as functional
from torch import Tensor

from .activation import silu_and_mul, silu_and_mul_reference
from .backends import uses_triton
from .compile_case import CompileCase, pointer
from .cpu.native import native_for
from .gate import Gate, GateKind
from .launch import KernelConfig, jit, launch, tl
from .tiles import rounded

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CONFIG = KernelConfig(tiles={"BLOCK": 1024}, num_warps=4, num_stages=1)
_CUBIC = 0.044715
_STEEPNESS = 2 * math.sqrt(2 / math.pi)
_CUBIC_NUMBER, _STEEPNESS_NUMBER = tl.constexpr(_CUBIC), tl.constexpr(_STEEPNESS)
_NUMBERS = {GateKind.SILU: 0, GateKind.GELU_TANH: 1, GateKind.CLAMPED: 2}
"""The kinds as kernels know them."""


def gate_and_mul_reference(gate_up_TI: Tensor, gate: Gate) -> Tensor:
    """Return ``act(gate) * up`` for gate and up side by side; what the gate becomes is rounded before it is multiplied.

    Shapes: gate_up_TI [..., 2 * size], gate first; returns [..., size]
    Source: as named in ``GateKind``
    """
    gate_TI, up_TI = gate_up_TI.chunk(2, dim=-1)
    match gate.kind:
        case GateKind.SILU:
            return silu_and_mul_reference(gate_up_TI)
        case GateKind.GELU_TANH:
            return functional.gelu(gate_TI, approximate="tanh") * up_TI
        case GateKind.CLAMPED:
            gate_TI = gate_TI.float().clamp(max=gate.limit)
            active_TI = (gate_TI * torch.sigmoid(gate.alpha * gate_TI)).to(up_TI.dtype)
            shifted_TI = up_TI.float().clamp(-gate.limit, gate.limit) + 1
            return (active_TI.float() * shifted_TI).to(up_TI.dtype)


@jit
def _gate_and_mul_kernel(
    gate_up_ptr, out_ptr, size, row_stride, alpha, limit, IS_CLAMPED: tl.constexpr, BLOCK: tl.constexpr
):
    """One program computes ``BLOCK`` numbers of a row: clamped, or else GELU by its tanh."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = columns < size
    gate_ptr = gate_up_ptr + row * row_stride
    gate = tl.load(gate_ptr + columns, mask=is_there, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + size + columns, mask=is_there, other=0.0).to(tl.float32)
    if IS_CLAMPED:
        # What is not a number is not above the limit, and stays so.
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + 1.0
        inner = gate * alpha
    else:
        inner = (gate + gate * gate * gate * _CUBIC_NUMBER) * _STEEPNESS_NUMBER
    active = rounded(gate / (1.0 + tl.exp(-inner)), out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * size + columns, rounded(active * up, out_ptr.dtype.element_ty), mask=is_there)


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``gate_and_mul`` launches, SwiGLU apart."""
    for dtype in _DTYPES:
        for is_clamped in (False, True):
            yield CompileCase(
                kernel=_gate_and_mul_kernel,
                name=f"{pointer(dtype)[1:]}{' clamped' if is_clamped else ''}",
                config=_CONFIG,
                signature={
                    **dict.fromkeys(("gate_up_ptr", "out_ptr"), pointer(dtype)),
                    **dict.fromkeys(("size", "row_stride"), "i32"),
                    **dict.fromkeys(("alpha", "limit"), "fp32"),
                },
                aligned=("size", "row_stride"),
                constants={"IS_CLAMPED": is_clamped},
            )


def gate_and_mul(gate_up_TI: Tensor, gate: Gate) -> Tensor:
    """As ``gate_and_mul_reference``. Whether a row's bits depend on other rows is as of ``silu_and_mul``.

    Raises: ValueError where gate and up are not of one size
    """
    if gate.kind is GateKind.SILU:
        return silu_and_mul(gate_up_TI)
    if gate_up_TI.shape[-1] % 2:
        raise ValueError(f"gate_up holds gate and up side by side: {gate_up_TI.shape[-1]} is not twice a size")
    size = gate_up_TI.shape[-1] // 2
    compiled = native_for(gate_up_TI)
    if gate_up_TI.dtype in _DTYPES and uses_triton("activation", gate_up_TI):
        return _by_triton(gate_up_TI, gate)
    if compiled is None or not gate_up_TI.is_contiguous():
        return gate_and_mul_reference(gate_up_TI, gate)
    out_TI = gate_up_TI.new_empty((*gate_up_TI.shape[:-1], size))
    compiled.gate_and_mul(
        gate_up_TI.data_ptr(),
        out_TI.data_ptr(),
        out_TI.numel() // max(size, 1),
        size,
        _NUMBERS[gate.kind],
        gate.alpha,
        gate.limit,
        gate_up_TI.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return out_TI


def _by_triton(gate_up_TI: Tensor, gate: Gate) -> Tensor:
    size = gate_up_TI.shape[-1] // 2
    rows_TI = gate_up_TI.reshape(-1, 2 * size) if size else gate_up_TI.new_empty(0, 0)
    out_TI = torch.empty((*gate_up_TI.shape[:-1], size), dtype=gate_up_TI.dtype, device=gate_up_TI.device)
    if rows_TI.stride(1) != 1:
        rows_TI = rows_TI.contiguous()
    launch(
        _gate_and_mul_kernel,
        (rows_TI.shape[0], -(-size // _CONFIG.tiles["BLOCK"])),
        _CONFIG,
        gate_up_ptr=rows_TI,
        out_ptr=out_TI,
        size=size,
        row_stride=rows_TI.stride(0),
        alpha=gate.alpha,
        limit=gate.limit,
        IS_CLAMPED=gate.kind is GateKind.CLAMPED,
    )
    return out_TI
