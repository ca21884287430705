"""The paged KV cache of one rank: one tensor a layer.

Owns the memory. Which block belongs to whom is the engine's business.

Shapes: a layer's cache is [2, num_blocks, KV heads, block size, head size], keys first, so that a range of
heads of a block is contiguous; of a model with latent attention [1, num_blocks, 1, block size, latent + rotated], keys
that are values too.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.kv_blocks import copy_blocks
from .model_spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCache:
    """Keys and values of all layers, in blocks."""

    layers: tuple[Tensor, ...]

    @classmethod
    def allocate(
        cls, spec: ModelSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> KvCache:
        """Allocate a cache with any contents: on a CPU, memory is taken only when a block is first written.

        What a block held before never counts: whoever enters a block clears it (``build_forward_batch``).
        """
        parts = 2 if spec.latent is None else 1
        shape = (parts, num_blocks, spec.num_kv_heads, block_size, spec.head_dim)
        return cls(layers=tuple(_empty(shape, dtype, device) for _ in range(spec.num_layers)))

    @property
    def num_blocks(self) -> int:
        """Return the blocks there are."""
        return self.layers[0].shape[1]

    @property
    def parts(self) -> int:
        """Return 2 where keys and values are numbers of their own, else 1."""
        return self.layers[0].shape[0]

    @property
    def block_size(self) -> int:
        """Return the token positions of a block."""
        return self.layers[0].shape[3]

    @property
    def bytes(self) -> int:
        """Return the bytes the cache takes."""
        return sum(layer.numel() * layer.element_size() for layer in self.layers)

    def copy_blocks(self, sources: NDArray[np.int32], targets: NDArray[np.int32]) -> None:
        """Copy whole blocks in every layer, as if one after the other.

        Shapes: sources, targets [copies] int32
        """
        copy_blocks(self.layers, sources, targets)

    def clear_from(self, block: int, position: int) -> None:
        """Set a block to zero from one of its positions on, in every layer: what an earlier owner left there may not
        even be a number.
        """
        for layer in self.layers:
            layer[:, block, :, position:] = 0


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    # Blocks are read in any order: with small pages, finding them takes as long as reading them.
    memory = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=prod(shape)).view(shape)
