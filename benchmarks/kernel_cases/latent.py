"""Attention over latents (DeepSeek-V2 and V3: 128 heads, 512 + 64 numbers), and decoding behind a shared prefix.

Torch's way gets keys side by side and of one length, without pages: the best that it can be given. A shared prefix is
held against the same decoding with each row reading all of its keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from slipstream.kernels.attention_decode import decode_attention
from slipstream.kernels.attention_items import DecodeItems, decode_items, prefill_items
from slipstream.kernels.attention_span import AttentionOptions
from slipstream.kernels.mla import mla_decode
from slipstream.kernels.mla_prefill import mla_prefill, mla_prefill_tile_rows
from slipstream.kernels.mla_span import MlaOptions
from slipstream.kernels.shared_items import SharedItems, share_items
from slipstream.kernels.shared_prefix import shared_decode_attention, shared_tile_rows

from .case import KernelCase

_DTYPE = torch.bfloat16
_BLOCK_SIZE, _LATENT, _WIDTH, _HEAD_SIZE = 64, 512, 576, 128
_OPTIONS = MlaOptions(scale=192**-0.5, latent=_LATENT)


def cases(device: torch.device) -> Iterator[KernelCase]:
    """Yield decoding and prefill of 16 heads (one of eight ranks) and all 128, and batches with a common prompt."""
    if device.type != "cuda":
        yield _decode(2, 127, 16, device)
        yield _prefill(0, 16, 16, device)
        yield _shared(4, 512, 4, 2, device)
        return
    for rows, keys, heads in ((1, 32768, 128), (32, 8192, 128), (128, 1024, 128), (32, 8192, 16), (8, 32768, 16)):
        yield _decode(rows, keys - 1, heads, device)
    for start, count, heads in ((0, 4096, 128), (6144, 2048, 128), (0, 8192, 16)):
        yield _prefill(start, count, heads, device)
    for rows, prefix in ((8, 8192), (32, 8192), (128, 2048), (32, 32768)):
        yield _shared(rows, prefix, 32, 8, device)


def _decode(rows: int, position: int, heads: int, device: torch.device) -> KernelCase:
    cache_BSW, tables_RB = _latents(rows, position + 1, device)
    q_TNW = torch.randn(rows, heads, _WIDTH, dtype=_DTYPE, device=device)
    out_TNL = torch.empty(rows, heads, _LATENT, dtype=_DTYPE, device=device)
    items = _on_device(_items(rows, position, tables_RB), device)
    keys = rows * (position + 1)
    k_R1LW = cache_BSW[torch.from_numpy(tables_RB).to(device).long()].flatten(1, 2)[:, None, : position + 1]
    return KernelCase(
        operation="mla_decode",
        shape=f"{rows} x {position + 1} keys, {heads} heads",
        dtype=_DTYPE,
        run=partial(mla_decode, q_TNW, cache_BSW, items, _OPTIONS, out_TNL),
        bytes=keys * _WIDTH * 2 + q_TNW.nbytes + out_TNL.nbytes,
        flops=2 * keys * heads * (_WIDTH + _LATENT),
        # All heads of a token as queries of the one KV head.
        baselines={"sdpa": partial(_sdpa, q_TNW[:, None], k_R1LW)},
    )


def _prefill(start: int, count: int, heads: int, device: torch.device) -> KernelCase:
    cache_BSW, tables_RB = _latents(1, start + count, device)
    q_TNW = torch.randn(count, heads, _WIDTH, dtype=_DTYPE, device=device)
    out_TNL = torch.empty(count, heads, _LATENT, dtype=_DTYPE, device=device)
    items = prefill_items(
        np.array([start]),
        np.array([count]),
        np.zeros(1, np.int64),
        tables_RB,
        heads_per_kv=heads,
        tile_rows=mla_prefill_tile_rows(heads, _DTYPE, _OPTIONS),
        device=device,
    )
    seen = count * start + count * (count + 1) // 2
    return KernelCase(
        operation="mla_prefill",
        shape=f"{count} behind {start}, {heads} heads",
        dtype=_DTYPE,
        run=partial(mla_prefill, q_TNW, cache_BSW, items, _OPTIONS, out_TNL),
        bytes=(start + count) * _WIDTH * 2 + q_TNW.nbytes + out_TNL.nbytes,
        flops=2 * seen * heads * (_WIDTH + _LATENT),
    )


def _shared(rows: int, prefix: int, heads: int, kv_heads: int, device: torch.device) -> KernelCase:
    position = prefix + 127
    tables_RB = _tables(rows, position + 1)
    tables_RB[:, : prefix // _BLOCK_SIZE] = tables_RB[0, : prefix // _BLOCK_SIZE]
    # Blocks that nobody has any more are left out.
    used, places = np.unique(tables_RB, return_inverse=True)
    tables_RB = places.reshape(tables_RB.shape).astype(np.int32)
    cache = torch.randn(2, len(used), kv_heads, _BLOCK_SIZE, _HEAD_SIZE, dtype=_DTYPE, device=device)
    q_TND = torch.randn(rows, heads, _HEAD_SIZE, dtype=_DTYPE, device=device)
    out_TND = torch.empty_like(q_TND)
    options = AttentionOptions(scale=_HEAD_SIZE**-0.5)
    items = _items(rows, position, tables_RB)
    shared = share_items(
        items,
        window=None,
        block_size=_BLOCK_SIZE,
        heads_per_kv=heads // kv_heads,
        tile_rows=shared_tile_rows(_HEAD_SIZE, _DTYPE, _DTYPE, deterministic=False),
    )
    return KernelCase(
        operation="shared_decode_attention",
        shape=f"{rows} rows, {prefix} keys in common, {heads}/{kv_heads} heads",
        dtype=_DTYPE,
        run=partial(shared_decode_attention, q_TND, cache, _shared_on_device(shared, device), options, out_TND),
        bytes=(prefix + rows * 128) * 2 * kv_heads * _HEAD_SIZE * 2 + 2 * q_TND.nbytes,
        flops=4 * rows * (position + 1) * heads * _HEAD_SIZE,
        baselines={"alone": partial(decode_attention, q_TND, cache, _on_device(items, device), options, out_TND)},
    )


def _tables(rows: int, keys: int) -> np.ndarray:
    """Return random block tables, as a cache that is in use has them."""
    blocks = -(-keys // _BLOCK_SIZE)
    return np.random.default_rng(0).permutation(rows * blocks).reshape(rows, blocks).astype(np.int32)


def _latents(rows: int, keys: int, device: torch.device) -> tuple[Tensor, np.ndarray]:
    tables_RB = _tables(rows, keys)
    return torch.randn(tables_RB.size, _BLOCK_SIZE, _WIDTH, dtype=_DTYPE, device=device), tables_RB


def _items(rows: int, position: int, tables_RB: np.ndarray) -> DecodeItems:
    return decode_items(np.full(rows, position), np.arange(rows), tables_RB, window=None, device=torch.device("cpu"))


def _on_device(items: DecodeItems, device: torch.device) -> DecodeItems:
    return replace(
        items,
        tables_RB=items.tables_RB.to(device),
        positions_R=items.positions_R.to(device),
        tokens_R=items.tokens_R.to(device),
        items_2C=items.items_2C.to(device),
        item_count_1=items.item_count_1.to(device),
        first_items_R1=items.first_items_R1.to(device),
    )


def _shared_on_device(items: SharedItems, device: torch.device) -> SharedItems:
    return replace(
        items,
        own=_on_device(items.own, device),
        members_S=items.members_S.to(device),
        tiles_4C=items.tiles_4C.to(device),
        tile_count_1=items.tile_count_1.to(device),
    )


def _sdpa(q_R1ND: Tensor, k_R1LD: Tensor) -> Tensor:
    return scaled_dot_product_attention(q_R1ND, k_R1LD, k_R1LD[..., :_LATENT], scale=_OPTIONS.scale)
