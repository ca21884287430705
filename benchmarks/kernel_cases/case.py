"""What ``bench_kernels`` measures: one case is one operation at one shape, with what it reads, writes, multiplies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

Run = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCase:
    """One operation at one shape.

    - ``run``: the operation, as the engine calls it, on tensors that are there already.
    - ``bytes``: what it has to read and write at least once; ``flops``: multiplications and additions, 0 if they do not
      matter. The fraction of the roof is that of the longer of the two times.
    - ``baselines``: torch's ways of doing the same, by name ("sdpa", "eager", "compile", "cublas"); those that torch
      refuses on this device are told as such, not left out.
    - ``wanted``: the fraction of the roof (or, with ``wanted_over``, the speed over that baseline) that is asked for on
      a GPU of the H200's class.
    """

    operation: str
    shape: str
    dtype: torch.dtype
    run: Run
    bytes: int
    flops: int = 0
    baselines: Mapping[str, Run] = field(default_factory=dict)
    wanted: float | None = None
    wanted_over: str | None = None


def by_torch(device: torch.device, way: Callable[..., object], *arguments: object) -> dict[str, Run]:
    """Return torch's operations as they are written ("eager"), and on a GPU what torch makes of them ("compile")."""
    ways: dict[str, Run] = {"eager": partial(way, *arguments)}
    if device.type == "cuda":  # on a CPU it needs a compiler, and takes half a minute for each shape
        ways["compile"] = partial(torch.compile(way, dynamic=False), *arguments)
    return ways


CasesOf = Callable[[torch.device], Iterator[KernelCase]]
"""Each file beside this one has ``cases(device)``: large shapes on a GPU, on a CPU such as take milliseconds."""
