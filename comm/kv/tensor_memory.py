"""A KV cache's tensors as what transports read and write: views on a CPU, staged elsewhere or as another type."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import CommMisuse
from .memory import KvMemory, KvStore
from .runs import KvShape
from .staging import CudaCopier, HostCopier, OnDevice, StagedStore


def store_of(
    layers: Sequence[Tensor],
    *,
    first_layer: int,
    heads: range,
    on_device: bool = False,
    wire: torch.dtype | None = None,
) -> KvStore:
    """Return a rank's cache for its transports.

    ``on_device``: for one that moves a GPU's memory as it is; ``wire``: the type of numbers on their way, None as in
    the cache.

    Shapes: layers [parts, num_blocks, heads, block_size, head_dim] each, contiguous
    ``first_layer`` and ``heads``: which of the model's these are

    Raises: CommMisuse
    """
    shape = _shape_of(layers, first_layer, heads)
    device = layers[0].device
    if device.type == "cpu":
        if wire not in (None, layers[0].dtype):
            return StagedStore(shape, layers, HostCopier(), wire=wire)
        return KvMemory(shape, [layer.view(-1).view(torch.uint8).numpy().data for layer in layers])
    if device.type != "cuda":
        raise CommMisuse(f"KV moves from and to CPUs and GPUs of CUDA or ROCm, not {device.type}")
    copier = CudaCopier(device)
    return StagedStore(shape, layers, OnDevice(copier, device) if on_device else copier, wire=wire)


def memory_of(layers: Sequence[Tensor], *, first_layer: int, heads: range) -> KvMemory:
    """Return the memory of a rank's cache that is on a CPU; as ``store_of``. Raises: CommMisuse"""
    store = store_of(layers, first_layer=first_layer, heads=heads)
    if not isinstance(store, KvMemory):
        raise CommMisuse(f"KV is memory of this process on a CPU alone, not on {layers[0].device}")
    return store


def _shape_of(layers: Sequence[Tensor], first_layer: int, heads: range) -> KvShape:
    if not layers:
        raise CommMisuse("a KV cache has at least one layer")
    parts, num_blocks, num_heads, block_size, head_dim = layers[0].shape
    if num_heads != len(heads):
        raise CommMisuse(f"a cache of {num_heads} heads was named heads {heads.start} to {heads.stop - 1}")
    for layer in layers:
        if layer.device != layers[0].device or not layer.is_contiguous() or layer.dtype != layers[0].dtype:
            raise CommMisuse("KV moves from and to tensors that are contiguous, of one type, and on one device")
    return KvShape(
        layers=range(first_layer, first_layer + len(layers)),
        heads=heads,
        num_blocks=num_blocks,
        block_size=block_size,
        row_bytes=head_dim * layers[0].element_size(),
        parts=parts,
    )
