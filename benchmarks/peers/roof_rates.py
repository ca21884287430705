"""What the machine itself reaches, as a contender: bytes read a second, and operations of a matrix product a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

Way = Callable[[], object]

_CPU_READ_BYTES = 1 << 30
"""Much larger than any last-level cache that two cores share."""
_CPU_SIDE = 2_048
_GPU_READ_BYTES = 1 << 32
_GPU_SIDE = 8_192


def load(options: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Prepare the operands; each request measures for about half a second, longer where the machine is slow."""
    torch.set_num_threads(options["threads"])
    device = torch.device(options["device"])
    on_gpu = device.type == "cuda"
    read_bytes, side = (_GPU_READ_BYTES, _GPU_SIDE) if on_gpu else (_CPU_READ_BYTES, _CPU_SIDE)
    numbers = torch.ones(read_bytes // 8, dtype=torch.float64, device=device)
    rows = {dtype: torch.randn(side, side, device=device).to(dtype) for dtype in (torch.bfloat16, torch.float32)}
    # A GPU adds single precision much faster than double.
    views = [numbers.view(torch.float32)] if on_gpu else [numbers, numbers.view(torch.int64)]
    reads: list[Way] = [view.sum for view in views]
    flops = {dtype: _products(row) for dtype, row in rows.items()}

    def run(request: dict[str, Any]) -> dict[str, Any]:
        repeats = request["repeats"]
        operations = 2 * side**3
        return {
            "read_bytes_per_s": read_bytes / _least_s(reads, repeats, device),
            "bf16_flop_per_s": operations / _least_s(flops[torch.bfloat16], repeats, device),
            "fp32_flop_per_s": operations / _least_s(flops[torch.float32], repeats, device),
        }

    return run


def _products(row: torch.Tensor) -> list[Way]:
    plain: Way = lambda: torch.mm(row, row)  # noqa: E731
    if row.is_cuda or not torch.backends.mkldnn.is_available():
        return [plain]
    packed = torch.ops.mkldnn._reorder_linear_weight(row, len(row))
    return [plain, lambda: torch.ops.mkldnn._linear_pointwise(row, packed, None, "none", [], "")]


def _least_s(ways: list[Way], repeats: int, device: torch.device) -> float:
    """Return the least time of any of several ways to do the same."""
    times_s = []
    with torch.inference_mode():
        for way in ways:
            # The first call of a way on a GPU loads its kernel.
            way()
        for _ in range(repeats):
            for way in ways:
                times_s.append(_seconds(way, device))
    return min(times_s)


def _seconds(way: Way, device: torch.device) -> float:
    if device.type != "cuda":
        began_s = time.perf_counter()
        way()
        return time.perf_counter() - began_s
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    way()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3
