"""What the machine itself reaches, as a contender: bytes read a second, and operations of a matrix product a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

_READ_BYTES = 1 << 30
"""Much larger than any last-level cache that two cores share."""
_SIDE = 2_048


def load(options: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Prepare the operands; each request measures for about half a second, longer where the machine is slow."""
    torch.set_num_threads(options["threads"])
    numbers = torch.ones(_READ_BYTES // 8, dtype=torch.float64)
    whole = numbers.view(torch.int64)
    rows = {dtype: torch.randn(_SIDE, _SIDE).to(dtype) for dtype in (torch.bfloat16, torch.float32)}

    def products(dtype: torch.dtype) -> list[Callable[[], object]]:
        row = rows[dtype]
        plain: Callable[[], object] = lambda: torch.mm(row, row)  # noqa: E731
        if not torch.backends.mkldnn.is_available():
            return [plain]
        packed = torch.ops.mkldnn._reorder_linear_weight(row, _SIDE)
        return [plain, lambda: torch.ops.mkldnn._linear_pointwise(row, packed, None, "none", [], "")]

    flops = {dtype: products(dtype) for dtype in rows}

    def run(request: dict[str, Any]) -> dict[str, Any]:
        repeats = request["repeats"]
        operations = 2 * _SIDE**3
        return {
            "read_bytes_per_s": _READ_BYTES / _least_s([numbers.sum, whole.sum], repeats),
            "bf16_flop_per_s": operations / _least_s(flops[torch.bfloat16], repeats),
            "fp32_flop_per_s": operations / _least_s(flops[torch.float32], repeats),
        }

    return run


def _least_s(ways: list[Callable[[], object]], repeats: int) -> float:
    """Return the least time of any of several ways to do the same."""
    times_s = []
    with torch.inference_mode():
        for _ in range(repeats):
            for way in ways:
                began_s = time.perf_counter()
                way()
                times_s.append(time.perf_counter() - began_s)
    return min(times_s)
