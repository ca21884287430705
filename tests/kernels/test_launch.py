"""What a launch hands to Triton, seen by a kernel that only notes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from slipstream.kernels.launch import HAS_TRITON, KernelConfig, launch

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="no Triton here: pip install triton")

CONFIG = KernelConfig(tiles={"BLOCK": 64}, num_warps=8, num_stages=4)


class Noting:
    """A kernel; ``launches`` are its grids and arguments."""

    __name__ = "noting"

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda **arguments: self.launches.append((grid, arguments))


@pytest.mark.parametrize(("hip", "stages"), [(None, 4), ("6.4", 2)])
def test_a_kernel_is_launched_as_it_is_compiled_ahead(
    hip: str | None, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    kernel = Noting()
    launch(kernel, (3, 2), CONFIG, size=7)
    expected = {"size": 7, "BLOCK": 64, "num_warps": 8, "num_stages": stages, "enable_fp_fusion": False}
    assert kernel.launches == [((3, 2), expected)]
    assert CONFIG.stages_on(amd=hip is not None) == stages


def test_an_empty_grid_is_no_launch() -> None:
    kernel = Noting()
    launch(kernel, (3, 0), CONFIG)
    assert not kernel.launches
