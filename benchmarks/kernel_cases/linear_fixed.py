"""Products in one order: of all inputs (the fused gate and up) and as a tree (the down projection), 8B-like sizes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from slipstream.kernels.linear_fixed import fixed_linear
from slipstream.kernels.tree_sum import LEAVES

from .case import KernelCase


def cases(device: torch.device) -> Iterator[KernelCase]:
    """Yield rows of decoding and of prefill."""
    is_gpu, dtype = device.type == "cuda", torch.bfloat16
    sizes = ((4096, 28672, 0), (14336, 4096, LEAVES)) if is_gpu else ((256, 1024, 0), (1024, 256, LEAVES))
    for inputs, outputs, leaves in sizes:
        weight_OI = torch.randn(outputs, inputs, dtype=dtype, device=device)
        for rows in (1, 32, 2048) if is_gpu else (1, 32):
            x_TI = torch.randn(rows, inputs, dtype=dtype, device=device)
            yield KernelCase(
                operation="fixed_linear tree" if leaves else "fixed_linear",
                shape=f"{rows} x {inputs} to {outputs}",
                dtype=dtype,
                run=partial(fixed_linear, x_TI, weight_OI, leaves=leaves),
                bytes=weight_OI.nbytes + x_TI.nbytes + rows * outputs * dtype.itemsize,
                flops=2 * rows * inputs * outputs,
                baselines={"cublas" if is_gpu else "torch": partial(torch.nn.functional.linear, x_TI, weight_OI)},
            )
