"""Rotary positions, and the way of new keys and values into the paged cache.

Shapes: T tokens, S heads (any mixture of query, key and value heads), K KV heads, D head size; a layer's
cache is [2, num_blocks, K, block_size, D], keys first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .cpu.native import native_for


def apply_rope_(x_TSD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> None:
    """Rotate in place the pairs (d, d + D/2) of every head by the angle of its token.

    Shapes: x_TSD [tokens, heads, head size], last axis contiguous; cos_TD, sin_TD [tokens, head size] of x's
    type, each angle in both halves, the first half of ``sin_TD`` negated
    Source: RoFormer (arXiv 2104.09864), section 3.4.2, in the half-split order of Hugging Face checkpoints
    """
    half = x_TSD.shape[-1] // 2
    swapped_TSD = torch.roll(x_TSD, half, dims=-1)
    x_TSD.mul_(cos_TD.unsqueeze(1)).addcmul_(swapped_TSD, sin_TD.unsqueeze(1))


def kv_write_rows(slots_T: Tensor, *, num_blocks: int, kv_heads: int, block_size: int) -> Tensor:
    """Return the rows of a layer's cache, seen as [rows, D], that the tokens' keys and values go to.

    Computed once a step and used by every layer.

    Shapes: slots_T [tokens] int64, block * block_size + offset; returns [tokens * 2 * KV heads] int64, for
    each token its key heads, then its value heads
    Raises: IndexError for a slot that the cache, on a CPU, does not have
    """
    if slots_T.device.type == "cpu" and slots_T.shape[0]:
        # What is written there is not checked again, layer by layer.
        lowest, highest = map(int, torch.aminmax(slots_T))
        if lowest < 0 or highest >= num_blocks * block_size:
            raise IndexError(f"slots {lowest} to {highest} of a cache of {num_blocks} blocks of {block_size}")
    blocks_T = torch.div(slots_T, block_size, rounding_mode="floor")
    # A block has ``block_size`` rows for each KV head, and a slot counts those of one.
    first_T = torch.add(slots_T, blocks_T, alpha=(kv_heads - 1) * block_size)
    heads_S = _head_rows(num_blocks, kv_heads, block_size, slots_T.device)
    return (first_T.unsqueeze(1) + heads_S).flatten()


@lru_cache(maxsize=64)
def _head_rows(num_blocks: int, kv_heads: int, block_size: int, device: torch.device) -> Tensor:
    """Return how many rows behind a token's first one its other key heads and its value heads stand."""
    with torch.inference_mode(mode=False):
        keys_K = torch.arange(kv_heads, device=device) * block_size
        return torch.cat((keys_K, keys_K + num_blocks * kv_heads * block_size))


def write_kv(kv_TSD: Tensor, rows: Tensor, layer_cache: Tensor) -> None:
    """Write the tokens' keys and values to their places.

    Shapes: kv_TSD [tokens, 2 * KV heads, head size], key heads first; rows [tokens * 2 * KV heads] from
    ``kv_write_rows``; layer_cache [2, blocks, KV heads, block size, head size] contiguous, same type
    """
    head_size = layer_cache.shape[-1]
    layer_cache.view(-1, head_size).index_copy_(0, rows, kv_TSD.reshape(-1, head_size))


def read_kv(rows: Tensor, layer_cache: Tensor) -> Tensor:
    """Return what ``write_kv`` wrote.

    Shapes: as there; returns [tokens, 2 * KV heads, head size]
    """
    kv_heads, head_size = layer_cache.shape[2], layer_cache.shape[-1]
    return layer_cache.view(-1, head_size).index_select(0, rows).view(-1, 2 * kv_heads, head_size)


def rotate_and_write_(
    qkv_TSD: Tensor, cos_TD: Tensor, sin_TD: Tensor, rows: Tensor, layer_cache: Tensor, *, heads: int
) -> None:
    """Rotate the queries in place, and write rotated keys, and values, to their places.

    What ``qkv_TSD`` holds of keys and values afterwards has no meaning.

    Shapes: qkv_TSD [tokens, heads + 2 * KV heads, head size] contiguous, queries, keys, values; others as in
    ``apply_rope_`` and ``write_kv``
    """
    head_size, kv_heads = layer_cache.shape[-1], layer_cache.shape[2]
    compiled = native_for(qkv_TSD)
    others = (cos_TD, sin_TD, layer_cache)
    is_plain = qkv_TSD.is_contiguous() and all(x.is_contiguous() and x.dtype == qkv_TSD.dtype for x in others)
    if compiled is None or not is_plain or head_size % 2 or not rows.is_contiguous():
        apply_rope_(qkv_TSD[:, : heads + kv_heads], cos_TD, sin_TD)
        write_kv(qkv_TSD[:, heads:], rows, layer_cache)
        return
    compiled.rope_kv(
        qkv_TSD.data_ptr(),
        cos_TD.data_ptr(),
        sin_TD.data_ptr(),
        rows.data_ptr(),
        layer_cache.data_ptr(),
        qkv_TSD.shape[0],
        qkv_TSD.stride(0),
        heads,
        kv_heads,
        head_size,
        qkv_TSD.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )


def clear_blocks(blocks_F: Tensor, layer_caches: Sequence[Tensor]) -> None:
    """Set whole blocks of all layers to zero, so that what an earlier owner left there (perhaps not a number) can never
    be read.

    Shapes: blocks_F [blocks] int64; layer_caches: each [2, blocks, KV heads, block size, head size], contiguous
    Raises: IndexError for a block that the caches, on a CPU, do not have
    """
    first = layer_caches[0]
    compiled = native_for(first)
    if compiled is None:
        for layer_cache in layer_caches:
            layer_cache.index_fill_(1, blocks_F, 0.0)
        return
    blocks = blocks_F.numpy()
    if blocks.size and (blocks.min() < 0 or blocks.max() >= first.shape[1]):
        raise IndexError(f"blocks {blocks.min()} to {blocks.max()} of a cache of {first.shape[1]}")
    halves = np.add.outer([layer.data_ptr() for layer in layer_caches], [0, first[0].nbytes])
    block_bytes = first[0, 0].nbytes
    places = np.add.outer(halves, blocks * block_bytes)
    compiled.clear(places.ctypes.data, places.size, block_bytes, torch.get_num_threads())
