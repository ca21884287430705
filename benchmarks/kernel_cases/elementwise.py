"""What moves each number once: activations, 8-bit rows, rotary positions with the write of KV."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from slipstream.kernels.activation import (
    silu_and_mul,
    silu_and_mul_quantized,
    silu_and_mul_quantized_reference,
    silu_and_mul_reference,
)
from slipstream.kernels.gate import Gate, GateKind
from slipstream.kernels.gated import gate_and_mul, gate_and_mul_reference
from slipstream.kernels.norm_quantized import add_rms_norm_quantized, add_rms_norm_quantized_reference
from slipstream.kernels.quantize_rows import quantize_rows, quantize_rows_reference
from slipstream.kernels.rope_kv import kv_write_rows, rotate_and_write_, rotate_and_write_reference_

from .case import KernelCase, by_torch

_DTYPE = torch.bfloat16
_FLOAT8 = torch.float8_e4m3fn


def cases(device: torch.device) -> Iterator[KernelCase]:
    """Yield the MLPs' and norms' rows of models of 8B and 70B, and their heads."""
    is_gpu = device.type == "cuda"
    for rows, size in ((128, 14336), (8192, 14336), (8192, 28672)) if is_gpu else ((32, 5504), (256, 5504)):
        # Rows that stay in the cache of the launch before say more of latency than of bandwidth.
        yield from _activation(rows, size, device, wanted=0.8 if rows > 1024 else None)
    for rows, size in ((128, 4096), (8192, 4096), (8192, 8192)) if is_gpu else ((32, 2048), (512, 2048)):
        yield from _quantized(rows, size, device, wanted=0.8 if rows > 1024 else None)
    shapes = ((128, 32, 128), (8192, 32, 128), (8192, 64, 128)) if is_gpu else ((32, 16, 64), (512, 16, 64))
    for tokens, heads, head_size in shapes:
        wanted = 0.8 if tokens > 1024 else None
        for kept in (_DTYPE, _FLOAT8):
            yield _rope_kv(tokens, heads, head_size, kept, device, wanted)


def _activation(rows: int, size: int, device: torch.device, wanted: float | None) -> Iterator[KernelCase]:
    gate_up_TI = torch.randn(rows, 2 * size, dtype=_DTYPE, device=device)
    yield KernelCase(
        operation="silu_and_mul",
        shape=f"{rows} x {size}",
        dtype=_DTYPE,
        run=partial(silu_and_mul, gate_up_TI),
        bytes=gate_up_TI.nbytes * 3 // 2,
        baselines=by_torch(device, silu_and_mul_reference, gate_up_TI),
        wanted=wanted,
    )
    for gate in (Gate(kind=GateKind.GELU_TANH), Gate(kind=GateKind.CLAMPED, alpha=1.702, limit=7.0)):
        yield KernelCase(
            operation=f"gate_and_mul {gate.kind}",
            shape=f"{rows} x {size}",
            dtype=_DTYPE,
            run=partial(gate_and_mul, gate_up_TI, gate),
            bytes=gate_up_TI.nbytes * 3 // 2,
            baselines=by_torch(device, gate_and_mul_reference, gate_up_TI, gate),
            wanted=wanted,
        )
    yield KernelCase(
        operation="silu_and_mul_quantized",
        shape=f"{rows} x {size}",
        dtype=_FLOAT8,
        run=partial(silu_and_mul_quantized, gate_up_TI, _FLOAT8),
        bytes=gate_up_TI.nbytes + rows * (size + 4),
        baselines=by_torch(device, silu_and_mul_quantized_reference, gate_up_TI, _FLOAT8),
        wanted=wanted,
    )


def _quantized(rows: int, size: int, device: torch.device, wanted: float | None) -> Iterator[KernelCase]:
    x_TH, residual_TH = (torch.randn(rows, size, dtype=_DTYPE, device=device) for _ in range(2))
    weight_H = torch.randn(size, dtype=_DTYPE, device=device)
    for dtype in (torch.int8, _FLOAT8):
        yield KernelCase(
            operation="quantize_rows",
            shape=f"{rows} x {size}",
            dtype=dtype,
            run=partial(quantize_rows, x_TH, dtype),
            bytes=x_TH.nbytes + rows * (size + 4),
            baselines=by_torch(device, quantize_rows_reference, x_TH, dtype),
            wanted=wanted,
        )
        yield KernelCase(
            operation="add_rms_norm_quantized",
            shape=f"{rows} x {size}",
            dtype=dtype,
            run=partial(add_rms_norm_quantized, x_TH, residual_TH, weight_H, 1e-6, dtype),
            bytes=3 * x_TH.nbytes + rows * (size + 4),
            baselines=by_torch(device, add_rms_norm_quantized_reference, x_TH, residual_TH, weight_H, 1e-6, dtype),
            wanted=wanted,
        )


def _rope_kv(
    tokens: int, heads: int, head_size: int, kept: torch.dtype, device: torch.device, wanted: float | None
) -> KernelCase:
    kv_heads, block_size = 8, 16
    qkv_TSD = torch.randn(tokens, heads + 2 * kv_heads, head_size, dtype=_DTYPE, device=device)
    cos_TD, sin_TD = (torch.randn(tokens, head_size, dtype=_DTYPE, device=device) for _ in range(2))
    blocks = -(-tokens // block_size) + 1
    cache = torch.zeros(2, blocks, kv_heads, block_size, head_size, dtype=kept, device=device)
    slots_T = torch.randperm(blocks * block_size, device=device)[:tokens]
    rows = kv_write_rows(slots_T, num_blocks=blocks, kv_heads=kv_heads, block_size=block_size)
    arguments = (qkv_TSD, cos_TD, sin_TD, rows, cache)
    kv_numbers = tokens * 2 * kv_heads * head_size
    return KernelCase(
        operation="rotate_and_write",
        shape=f"{tokens} tokens, {heads} + 2 x {kv_heads} heads of {head_size}",
        dtype=kept,
        run=partial(rotate_and_write_, *arguments, heads=heads),
        # All heads are read, queries written back; angles and rows once for a token.
        bytes=qkv_TSD.nbytes
        + tokens * heads * head_size * _DTYPE.itemsize
        + kv_numbers * kept.itemsize
        + 2 * cos_TD.nbytes
        + rows.nbytes,
        baselines=by_torch(device, partial(rotate_and_write_reference_, heads=heads), *arguments),
        wanted=wanted,
    )
