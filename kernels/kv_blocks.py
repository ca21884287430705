"""Copies of whole KV blocks, for copy on write.

Shapes: a layer's cache is [2, num_blocks, KV heads, block size, head size].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def copy_blocks(layer_caches: Sequence[Tensor], sources: NDArray[np.int32], targets: NDArray[np.int32]) -> None:
    """Copy block ``sources[i]`` to ``targets[i]`` in every layer, as if one after the other in the order
    given.

    Shapes: sources, targets [copies] int32; layer_caches: one tensor a layer, all of the same device
    """
    if len(sources) != len(targets):
        raise ValueError(f"as many targets as sources are needed, got {len(targets)} and {len(sources)}")
    for first, last in _independent_runs(sources.tolist(), targets.tolist()):
        for cache in layer_caches:
            source = torch.from_numpy(sources[first:last].astype(np.int64)).to(cache.device)
            target = torch.from_numpy(targets[first:last].astype(np.int64)).to(cache.device)
            cache.index_copy_(1, target, cache.index_select(1, source))


def _independent_runs(sources: list[int], targets: list[int]) -> Iterator[tuple[int, int]]:
    # A run is read whole before it is written: it must end before a block that it has written is read or
    # written again.
    first = 0
    written: set[int] = set()
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if source in written or target in written:
            yield first, i
            first, written = i, set()
        written.add(target)
    if first < len(sources):
        yield first, len(sources)
