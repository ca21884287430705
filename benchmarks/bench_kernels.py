"""Every operation of ``kernels/``: its time, what it has to move or multiply, how near it comes to the machine's roof.

The roofs are measured in the same rounds: a copy of memory, and a matrix product of the operation's type. A case's
``of roof`` is the time that its bytes (at the copy's rate) or its flops (at the product's) take at least, whichever is
longer, over the time that it took. Beside it: how much faster than torch's own ways. On a GPU operations are Triton's
kernels; on a CPU, which the script says, they are compiled C and torch's operations, at small shapes.

It needs torch and Triton, and nothing else; this package need not be installed:

    python -P benchmarks/bench_kernels.py --json benchmarks/results/kernels.json

``--only norm attention_decode`` measures some of them. What is wanted holds for a GPU of the H200's class.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

if find_spec("slipstream") is None:  # a checkout that is not installed: the package is its root, under its own name
    _PATH = Path(tempfile.mkdtemp(prefix="slipstream-"))
    (_PATH / "slipstream").symlink_to(Path(__file__).resolve().parents[1], target_is_directory=True)
    sys.path.insert(0, str(_PATH))

from slipstream.benchmarks.kernel_cases import (
    attention,
    elementwise,
    kv,
    latent,
    linear,
    linear_fixed,
    moe,
    norm,
    sample,
)
from slipstream.benchmarks.kernel_cases.case import CasesOf, KernelCase, Run
from slipstream.benchmarks.kernel_cases.timing import Stopwatch, interleaved, ratio
from slipstream.benchmarks.report import write_report

FILES: Mapping[str, CasesOf] = {
    "attention": attention.cases,
    "elementwise": elementwise.cases,
    "kv": kv.cases,
    "latent": latent.cases,
    "linear": linear.cases,
    "linear_fixed": linear_fixed.cases,
    "moe": moe.cases,
    "norm": norm.cases,
    "sample": sample.cases,
}
_COPY, _PRODUCT = "copy", "product"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One case. Units: seconds (median), bytes and flops a second; ``faster`` by baseline, None if torch refused it."""

    operation: str
    shape: str
    dtype: str
    seconds: float
    bytes_per_s: float
    flops_per_s: float
    of_roof: float
    bound_by: str
    faster: dict[str, float | None]
    wanted: float | None
    wanted_over: str | None

    @property
    def is_missed(self) -> bool:
        """Return whether what is wanted was not reached."""
        if self.wanted is None:
            return False
        if self.wanted_over is None:
            return self.of_roof < self.wanted
        return (self.faster.get(self.wanted_over) or 0.0) < self.wanted


class Roofs:
    """What the machine can do: runs that copy and multiply, timed beside each case."""

    def __init__(self, device: torch.device) -> None:
        is_gpu = device.type == "cuda"
        elements = (1 << 30 if is_gpu else 1 << 26) // 4
        self._source = torch.ones(elements, dtype=torch.float32, device=device)
        self._target = torch.empty_like(self._source)
        self._size = 8192 if is_gpu else 1024
        self._device = device

    def copy(self) -> tuple[Run, int]:
        """Return a copy, and the bytes that it reads and writes."""
        return (lambda: self._target.copy_(self._source)), 2 * self._source.nbytes

    def product(self, dtype: torch.dtype) -> tuple[Run, int]:
        """Return a matrix product of numbers of a type, and its flops; eight bits are multiplied as bfloat16 is."""
        dtype = dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.bfloat16
        a, b = (torch.randn(self._size, self._size, dtype=dtype, device=self._device) for _ in range(2))
        return (lambda: a @ b), 2 * self._size**3


def measure(case: KernelCase, stopwatch: Stopwatch, roofs: Roofs, *, rounds: int) -> Point:
    """Return a case's figures; its baselines and the roofs take turns with it."""
    copy, copied_bytes = roofs.copy()
    product, product_flops = roofs.product(case.dtype)
    runs: dict[str, Run] = {"": case.run, _COPY: copy}
    if case.flops:
        runs[_PRODUCT] = product
    refused: dict[str, float | None] = {}
    prepared: dict[str, Run] = {name: stopwatch.prepare(run) for name, run in runs.items()}
    for name, run in case.baselines.items():
        try:
            prepared[name] = stopwatch.prepare(run)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            print(f"  {case.operation} {case.shape}: torch refuses {name}: {str(error).splitlines()[0]}")
            refused[name] = None
    times = interleaved(stopwatch, prepared, rounds=rounds)
    moving = [case.bytes / copied_bytes * seconds for seconds in times[_COPY]]
    multiplying = [case.flops / product_flops * seconds for seconds in times.get(_PRODUCT, [0.0] * rounds)]
    least = [max(pair) for pair in zip(moving, multiplying, strict=True)]
    seconds = median(times[""])
    return Point(
        operation=case.operation,
        shape=case.shape,
        dtype=str(case.dtype).removeprefix("torch."),
        seconds=seconds,
        bytes_per_s=case.bytes / seconds,
        flops_per_s=case.flops / seconds,
        of_roof=ratio(least, times[""]),
        bound_by=_COPY if median(moving) >= median(multiplying) else _PRODUCT,
        faster={**refused, **{name: ratio(times[name], times[""]) for name in case.baselines if name in times}},
        wanted=case.wanted,
        wanted_over=case.wanted_over,
    )


def _line(point: Point, *, is_gpu: bool) -> str:
    faster = ", ".join(
        f"{name} refused" if times is None else f"{times:.2f}x {name}" for name, times in point.faster.items()
    )
    wanted = ""
    if is_gpu and point.wanted is not None:
        over = f"x {point.wanted_over}" if point.wanted_over else " of roof"
        wanted = f"  wanted {point.wanted:g}{over}{': MISSED' if point.is_missed else ''}"
    rate = (
        f"{point.bytes_per_s / 1e9:8.1f} GB/s" if point.bound_by == _COPY else f"{point.flops_per_s / 1e12:7.2f} TF/s"
    )
    return (
        f"{point.operation:24} {point.shape:34} {point.dtype:14} {point.seconds * 1e6:10.1f} us {rate}"
        f"  {point.of_roof:5.2f} of {point.bound_by:7}  {faster}{wanted}"
    )


def points(files: list[str], device: torch.device, *, rounds: int) -> Iterator[Point]:
    """Yield each case's figures, told as they come."""
    stopwatch, roofs = Stopwatch(device), Roofs(device)
    for file in files:
        for case in FILES[file](device):
            point = measure(case, stopwatch, roofs, rounds=rounds)
            print(_line(point, is_gpu=device.type == "cuda"), flush=True)
            yield point


def main() -> None:
    """Measure, print and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(FILES), default=list(FILES), help="some files of kernels/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=None, help="rounds of each case (GPU 30, CPU 7)")
    parser.add_argument("--json", type=Path, help="write a report to this file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    is_gpu = device.type == "cuda"
    print(f"device: {torch.cuda.get_device_name(device)}" if is_gpu else _NO_GPU)
    with torch.inference_mode():
        measured = list(points(arguments.only, device, rounds=arguments.rounds or (30 if is_gpu else 7)))
    missed = [f"{point.operation} {point.shape} {point.dtype}" for point in measured if is_gpu and point.is_missed]
    if is_gpu:
        print(f"missed: {', '.join(missed) or 'nothing'}")
    if arguments.json:
        figures: dict[str, Any] = {"device": str(device), "points": [asdict(point) for point in measured]}
        write_report(arguments.json, "kernels", figures)


_NO_GPU = "device: cpu. There is no GPU: what is measured are the CPU's ways (compiled C, torch), not the kernels."

if __name__ == "__main__":
    main()
