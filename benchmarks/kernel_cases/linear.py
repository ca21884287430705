"""Products with quantized weights: layers of 8B and 70B models, few rows and many, against bfloat16 weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as functional
from torch import Tensor

from slipstream.kernels.int4_codes import quantize_int4
from slipstream.kernels.linear_w4a16 import linear_w4a16, pack_int4_matrix
from slipstream.kernels.linear_w8a8 import BYTE_TYPES, linear_w8a8_rows, quantize_matrix
from slipstream.kernels.quantize_rows import quantize_rows

from .case import KernelCase

_LAYERS = ((4096, 4096), (28672, 4096), (4096, 14336), (8192, 28672))
"""Outputs and inputs: attention's output and the MLP of an 8B model, the MLP of a 70B one."""
_SMALL_LAYERS = ((512, 512),)
_GROUP = 128


def cases(device: torch.device) -> Iterator[KernelCase]:
    """Yield layers and numbers of rows, for 4-bit weights and both kinds of 8 bits."""
    is_gpu = device.type == "cuda"
    dtype = torch.bfloat16
    for outputs, inputs in _LAYERS if is_gpu else _SMALL_LAYERS:
        weight_OI = torch.randn(outputs, inputs, dtype=dtype, device=device)
        for rows in (1, 16, 64, 2048) if is_gpu else (1, 16):
            x_TI = torch.randn(rows, inputs, dtype=dtype, device=device)
            yield from _cases(x_TI, weight_OI, is_gpu=is_gpu)


def _cases(x_TI: Tensor, weight_OI: Tensor, *, is_gpu: bool) -> Iterator[KernelCase]:
    (rows, inputs), outputs, device = x_TI.shape, weight_OI.shape[0], x_TI.device
    plain = partial(functional.linear, x_TI, weight_OI)
    shape, flops = f"{rows} x {inputs} to {outputs}", 2 * rows * inputs * outputs
    out_bytes = rows * outputs * x_TI.element_size()
    int4 = pack_int4_matrix(quantize_int4(weight_OI, group=_GROUP))
    yield KernelCase(
        operation="linear_w4a16",
        shape=shape,
        dtype=x_TI.dtype,
        run=partial(linear_w4a16, x_TI, int4),
        bytes=int4.nbytes + x_TI.nbytes + out_bytes,
        flops=flops,
        baselines={"bf16": plain},
        wanted=3.0 if rows <= 16 else None,
        wanted_over="bf16" if rows <= 16 else None,
    )
    for kind in BYTE_TYPES:
        if is_gpu and kind == torch.float8_e4m3fn and torch.cuda.get_device_capability(device) < (8, 9):
            continue
        matrix = quantize_matrix(weight_OI, kind)
        quantized_TI, scales_T1 = quantize_rows(x_TI, kind)
        yield KernelCase(
            operation="linear_w8a8",
            shape=shape,
            dtype=kind,
            run=partial(linear_w8a8_rows, quantized_TI, scales_T1, matrix, dtype=x_TI.dtype),
            bytes=matrix.values_OI.nbytes + quantized_TI.nbytes + out_bytes,
            flops=flops,
            baselines={"bf16": plain},
        )
