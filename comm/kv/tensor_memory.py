"""A KV cache's tensors as the memory that transports read and write: views, no copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import CommMisuse
from .memory import KvMemory
from .runs import KvShape


def memory_of(layers: Sequence[Tensor], *, first_layer: int, heads: range) -> KvMemory:
    """Return the memory of a rank's cache.

    Shapes: layers [2, num_blocks, heads, block_size, head_dim] each, contiguous, on a CPU
    ``first_layer`` and ``heads``: which of the model's these are

    Raises: CommMisuse
    """
    if not layers:
        raise CommMisuse("a KV cache has at least one layer")
    _, num_blocks, num_heads, block_size, head_dim = layers[0].shape
    if num_heads != len(heads):
        raise CommMisuse(f"a cache of {num_heads} heads was named heads {heads.start} to {heads.stop - 1}")
    for layer in layers:
        if layer.device.type != "cpu" or not layer.is_contiguous() or layer.dtype != layers[0].dtype:
            raise CommMisuse("KV moves from and to tensors that are contiguous, of one type, and on a CPU")
    shape = KvShape(
        layers=range(first_layer, first_layer + len(layers)),
        heads=heads,
        num_blocks=num_blocks,
        block_size=block_size,
        row_bytes=head_dim * layers[0].element_size(),
    )
    return KvMemory(shape, [layer.view(-1).view(torch.uint8).numpy().data for layer in layers])
