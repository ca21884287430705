"""KV blocks copied, cleared, gathered for a transfer and scattered where it arrives."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from slipstream.kernels.kv_blocks import clear_blocks, clear_blocks_reference, copy_blocks
from slipstream.kernels.kv_pack import (
    gather_rows,
    gather_rows_reference,
    scatter_rows,
    scatter_rows_reference_,
)

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
    yield from _moved_rows(device, caches[0], blocks_B, wanted)


def _moved_rows(
    device: torch.device, cache: torch.Tensor, blocks_B: torch.Tensor, wanted: float | None
) -> Iterator[KernelCase]:
    """Yield a layer's part of a transfer: whole blocks, some heads of them, and as numbers of 8 bits."""
    blocks, kv_heads = cache.shape[1:3]
    for heads, dtype in ((8, _DTYPE), (2, _DTYPE), (8, _FLOAT8)):
        # Of all heads a block is one row; of some each head is.
        of_block = kv_heads // heads
        rows = cache.view(2 * blocks * (1 if of_block == 1 else kv_heads), -1)
        places = torch.stack((blocks_B, blocks_B + blocks)).view(-1, 1)
        index = places if of_block == 1 else places * kv_heads + torch.arange(heads, device=device)
        index = index.reshape(-1)
        packed = torch.empty(len(index), rows.shape[1], dtype=dtype, device=device)
        gather_rows(rows, index, packed)
        for operation, run, reference in (
            ("gather_rows", gather_rows, gather_rows_reference),
            ("scatter_rows", scatter_rows, scatter_rows_reference_),
        ):
            yield KernelCase(
                operation=operation,
                shape=f"{len(blocks_B)} blocks, {heads} of {kv_heads} heads",
                dtype=dtype,
                run=partial(run, rows, index, packed),
                bytes=packed.numel() * rows.element_size() + packed.nbytes,
                baselines=by_torch(device, reference, rows, index, packed),
                wanted=wanted,
            )


def _copy_by_index(caches: list[torch.Tensor], sources: torch.Tensor, targets: torch.Tensor) -> None:
    for cache in caches:
        cache.index_copy_(1, targets, cache.index_select(1, sources))
