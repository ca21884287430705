"""KV blocks copied, cleared, gathered for a transfer and scattered where it arrives."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from slipstream.kernels.kv_blocks import clear_blocks, clear_blocks_reference, copy_blocks
from slipstream.kernels.kv_pack import pack_kv, pack_kv_reference, unpack_kv_, unpack_kv_reference_

from .case import KernelCase, by_torch

_DTYPE = torch.bfloat16
_FLOAT8 = torch.float8_e4m3fn


def cases(device: torch.device) -> Iterator[KernelCase]:
    """Yield blocks of 16 tokens of a model with 32 layers and 8 KV heads of 128."""
    is_gpu = device.type == "cuda"
    layers, blocks, moved = (32, 4096, 512) if is_gpu else (4, 256, 64)
    caches = [torch.randn(2, blocks, 8, 16, 128, dtype=_DTYPE, device=device) for _ in range(layers)]
    order = torch.randperm(blocks)[: 2 * moved]
    sources, targets = order.numpy().astype(np.int32).reshape(2, moved)
    blocks_B = order[:moved].to(device)
    moved_bytes = layers * moved * caches[0][:, 0].nbytes
    wanted = 0.8 if is_gpu else None
    shape = f"{moved} blocks, {layers} layers"
    yield KernelCase(
        operation="copy_blocks",
        shape=shape,
        dtype=_DTYPE,
        run=partial(copy_blocks, caches, sources, targets),
        bytes=2 * moved_bytes,
        baselines=by_torch(device, _copy_by_index, caches, blocks_B, order[moved:].to(device)),
        wanted=wanted,
    )
    yield KernelCase(
        operation="clear_blocks",
        shape=shape,
        dtype=_DTYPE,
        run=partial(clear_blocks, blocks_B, caches),
        bytes=moved_bytes,
        baselines={"eager": partial(clear_blocks_reference, blocks_B, caches)},
        wanted=wanted,
    )
    for heads, dtype in ((range(8), _DTYPE), (range(2), _DTYPE), (range(8), _FLOAT8)):
        packed = pack_kv(caches, blocks_B, heads, dtype)
        what = f"{shape}, {len(heads)} of 8 heads"
        read = moved_bytes * len(heads) // 8
        yield KernelCase(
            operation="pack_kv",
            shape=what,
            dtype=dtype,
            run=partial(pack_kv, caches, blocks_B, heads, dtype),
            bytes=read + packed.nbytes,
            baselines=by_torch(device, pack_kv_reference, caches, blocks_B, heads, dtype),
            wanted=wanted,
        )
        yield KernelCase(
            operation="unpack_kv",
            shape=what,
            dtype=dtype,
            run=partial(unpack_kv_, packed, caches, blocks_B, heads),
            bytes=read + packed.nbytes,
            baselines=by_torch(device, unpack_kv_reference_, packed, caches, blocks_B, heads),
            wanted=wanted,
        )


def _copy_by_index(caches: list[torch.Tensor], sources: torch.Tensor, targets: torch.Tensor) -> None:
    for cache in caches:
        cache.index_copy_(1, targets, cache.index_select(1, sources))
