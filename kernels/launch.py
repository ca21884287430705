"""Triton as the operations use it: there or not, compiled or interpreted; how a kernel is configured and launched.

Every kernel is decorated with ``jit`` and launched through ``launch``: so that a machine without Triton can import all
operations, and what a kernel is launched with can be held against what is compiled ahead of time (``compile_ahead``).

The interpreter (``TRITON_INTERPRET=1`` in the environment, before anything is imported) runs kernels on CPU tensors.
Its arithmetic on bfloat16 is wrong, so kernels load with ``.to(tl.float32)`` where they compute, and multiply tiles
with ``tiles.dot``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

HAS_TRITON = find_spec("triton") is not None

if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.language as tl
    from triton.runtime.errors import OutOfResources, PTXASError

    jit: Callable[[Callable[..., None]], Any] = triton.jit
    _DOES_NOT_FIT: tuple[type[Exception], ...] = (OutOfResources, PTXASError)
else:
    _DOES_NOT_FIT = ()

    class _NoLanguage:
        """Lets modules with kernels be imported where there is no Triton."""

        def __getattr__(self, name: str) -> Any:
            return lambda *values, **named: values[0] if values else None

    tl = _NoLanguage()

    def jit(kernel: Callable[..., Any]) -> Any:
        """Leave a kernel as it is: nothing launches it."""
        return kernel


INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
"""Kernels run on CPU tensors, in the interpreter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelConfig:
    """How a kernel is cut and compiled: tiles, which are ``tl.constexpr`` parameters of these names, warps and stages.

    Products and sums are not contracted (no fused multiply-add of its own accord): what a kernel computes must not
    depend on how the compiler reads the code around it.
    """

    tiles: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    def stages_on(self, *, amd: bool) -> int:
        """Return the stages that a kernel is compiled with: AMD's pipeliner takes no more than two."""
        return min(2, self.num_stages) if amd else self.num_stages

    def __str__(self) -> str:
        """Return a short name, as reports and caches spell it."""
        tiles = " ".join(f"{name.lower()}={value}" for name, value in self.tiles.items())
        return f"{tiles} warps={self.num_warps} stages={self.num_stages}".strip()


Observer = Callable[[Any, KernelConfig, Mapping[str, Any]], None]
_observers: list[Observer] = []


def launch(kernel: Any, grid: tuple[int, ...], config: KernelConfig, **arguments: Any) -> None:
    """Run a kernel over a grid of programs; every argument by its name, constants too. An empty grid is no launch.

    Raises: RuntimeError where there is no Triton, or where the device has no room for such tiles
    """
    if not HAS_TRITON:
        raise RuntimeError(f"{kernel.__name__} needs Triton: install it, or choose the torch backend")
    if 0 in grid:
        return
    for observer in _observers:
        observer(kernel, config, arguments)
    try:
        kernel[grid](
            **arguments,
            **config.tiles,
            num_warps=config.num_warps,
            num_stages=config.stages_on(amd=torch.version.hip is not None),
            enable_fp_fusion=False,
        )
    except _DOES_NOT_FIT as error:
        raise RuntimeError(f"{kernel.__name__} with {config} does not fit this device: {error}") from error


@contextmanager
def observed_launches(observer: Observer) -> Iterator[None]:
    """Within the ``with``, tell ``observer`` of each launch: tests hold it against what is compiled ahead."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def runs_triton_on(device: torch.device) -> bool:
    """Return whether kernels can be launched on a device: a GPU, or any in the interpreter."""
    return HAS_TRITON and (device.type == "cuda" or INTERPRETED)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is not less than ``n``, at least 1."""
    return 1 << max(0, n - 1).bit_length()


def processors(device: torch.device) -> int:
    """Return how many programs a device runs side by side, one on each of its multiprocessors; 4 in the interpreter."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def triton_version() -> str:
    """Return the version of Triton; "none" without it."""
    return str(triton.__version__) if HAS_TRITON else "none"
