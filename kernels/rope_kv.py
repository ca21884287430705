"""Rotary positions, and the way of new keys and values into the paged cache.

Shapes: T tokens, S heads (any mixture of query, key and value heads), K KV heads, D head size; a layer's
cache is [2, num_blocks, K, block_size, D], keys first, or [1, ...] of keys that are values too.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from .backends import uses_triton
from .compile_case import CompileCase, pointer, targets_for
from .cpu.native import native_for
from .launch import KernelConfig, jit, launch, next_power_of_2, tl
from .tiles import rounded

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FLOAT8 = torch.float8_e4m3fn
_LARGEST = 448.0


def apply_rope_(x_TSD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> None:
    """Rotate in place the pairs (d, d + D/2) of every head by the angle of its token.

    Shapes: x_TSD [tokens, heads, head size], last axis contiguous; cos_TD, sin_TD [tokens, head size] of x's
    type, each angle in both halves, the first half of ``sin_TD`` negated
    Source: RoFormer (arXiv 2104.09864), section 3.4.2, in the half-split order of Hugging Face checkpoints
    """
    half = x_TSD.shape[-1] // 2
    swapped_TSD = torch.roll(x_TSD, half, dims=-1)
    x_TSD.mul_(cos_TD.unsqueeze(1)).addcmul_(swapped_TSD, sin_TD.unsqueeze(1))


def kv_write_rows(slots_T: Tensor, *, num_blocks: int, kv_heads: int, block_size: int, parts: int = 2) -> Tensor:
    """Return the rows of a layer's cache, seen as [rows, D], that the tokens' keys and values go to.

    Computed once a step and used by every layer. ``parts``: of the cache, keys and values, or 1 that is both.

    Shapes: slots_T [tokens] int64, block * block_size + offset; returns [tokens * parts * KV heads] int64, for
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
    heads_S = _head_rows(num_blocks, kv_heads, block_size, parts, slots_T.device)
    return (first_T.unsqueeze(1) + heads_S).flatten()


@lru_cache(maxsize=64)
def _head_rows(num_blocks: int, kv_heads: int, block_size: int, parts: int, device: torch.device) -> Tensor:
    """Return how many rows behind a token's first one its other key heads and its value heads stand."""
    with torch.inference_mode(mode=False):
        keys_K = torch.arange(kv_heads, device=device) * block_size
        return torch.cat([keys_K + part * num_blocks * kv_heads * block_size for part in range(parts)])


def write_kv(kv_TSD: Tensor, rows: Tensor, layer_cache: Tensor, *, k_scale: float = 1.0, v_scale: float = 1.0) -> None:
    """Write the tokens' keys and values to their places; a cache of float8 has what its scales are multiplied with.

    Shapes: kv_TSD [tokens, 2 * KV heads, head size], key heads first; rows [tokens * 2 * KV heads] from
    ``kv_write_rows``; layer_cache [2, blocks, KV heads, block size, head size] contiguous, same type or float8_e4m3fn
    """
    head_size = layer_cache.shape[-1]
    if layer_cache.dtype == _FLOAT8:
        kv_TSD = _as_float8(kv_TSD, k_scale, v_scale).view(torch.uint8)
        layer_cache = layer_cache.view(torch.uint8)
    layer_cache.view(-1, head_size).index_copy_(0, rows, kv_TSD.reshape(-1, head_size))


def _as_float8(kv_TSD: Tensor, k_scale: float, v_scale: float) -> Tensor:
    keys_TKD, values_TKD = kv_TSD.float().chunk(2, dim=1)
    scaled_TSD = torch.cat((keys_TKD * (1 / k_scale), values_TKD * (1 / v_scale)), dim=1)
    return scaled_TSD.clamp_(-_LARGEST, _LARGEST).to(_FLOAT8)


def read_kv(rows: Tensor, layer_cache: Tensor) -> Tensor:
    """Return what ``write_kv`` wrote, in the cache's type.

    Shapes: as there; returns [tokens, 2 * KV heads, head size]
    """
    kv_heads, head_size = layer_cache.shape[2], layer_cache.shape[-1]
    return layer_cache.view(-1, head_size).index_select(0, rows).view(-1, 2 * kv_heads, head_size)


def rotate_and_write_reference_(
    qkv_TSD: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    rows: Tensor,
    layer_cache: Tensor,
    *,
    heads: int,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Rotate the queries in place, and write rotated keys, and values, to their places.

    What ``qkv_TSD`` holds of keys and values afterwards has no meaning. What is written to a cache of float8 is divided
    by the scales.

    Shapes: qkv_TSD [tokens, heads + 2 * KV heads, head size], queries, keys, values; others as in ``apply_rope_`` and
    ``write_kv``
    """
    kv_heads = layer_cache.shape[2]
    apply_rope_(qkv_TSD[:, : heads + kv_heads], cos_TD, sin_TD)
    write_kv(qkv_TSD[:, heads:], rows, layer_cache, k_scale=k_scale, v_scale=v_scale)


@jit
def _rope_kv_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    rows_ptr,
    cache_ptr,
    token_stride,
    heads,
    kv_heads,
    head_size,
    k_factor,
    v_factor,
    IS_SCALED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """One program places ``HEADS`` heads of a token: queries where they were, keys and values in the cache."""
    token = tl.program_id(0).to(tl.int64)
    head_S1 = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    half = head_size // 2
    pair = tl.arange(0, HALF)
    is_pair = pair < half
    is_there = (head_S1 < heads + 2 * kv_heads) & is_pair
    source_ptr = qkv_ptr + token * token_stride + head_S1 * head_size + pair
    low = tl.load(source_ptr, mask=is_there, other=0.0).to(tl.float32)
    high = tl.load(source_ptr + half, mask=is_there, other=0.0).to(tl.float32)
    angle = token * head_size + pair
    low_cos = tl.load(cos_ptr + angle, mask=is_pair, other=0.0).to(tl.float32)
    high_cos = tl.load(cos_ptr + angle + half, mask=is_pair, other=0.0).to(tl.float32)
    low_sin = tl.load(sin_ptr + angle, mask=is_pair, other=0.0).to(tl.float32)
    high_sin = tl.load(sin_ptr + angle + half, mask=is_pair, other=0.0).to(tl.float32)
    # The product with the cosine is rounded, as by the separate operations.
    TYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    turned_low = rounded(rounded(low * low_cos, TYPE).to(tl.float32) + high * low_sin, TYPE)
    turned_high = rounded(rounded(high * high_cos, TYPE).to(tl.float32) + low * high_sin, TYPE)
    is_query = is_there & (head_S1 < heads)
    tl.store(source_ptr, turned_low, mask=is_query)
    tl.store(source_ptr + half, turned_high, mask=is_query)
    is_kept_head = (head_S1 >= heads) & (head_S1 < heads + 2 * kv_heads)
    is_kept = is_kept_head & is_pair
    is_value = head_S1 >= heads + kv_heads
    low, high = tl.where(is_value, low, turned_low.to(tl.float32)), tl.where(is_value, high, turned_high.to(tl.float32))
    if IS_SCALED:
        factor = tl.where(is_value, v_factor, k_factor)
        low, high = low * factor, high * factor
    row_S1 = tl.load(rows_ptr + token * 2 * kv_heads + head_S1 - heads, mask=is_kept_head, other=0)
    target_ptr = cache_ptr + row_S1 * head_size + pair
    KEPT: tl.constexpr = cache_ptr.dtype.element_ty
    tl.store(target_ptr, rounded(low, KEPT), mask=is_kept)
    tl.store(target_ptr + half, rounded(high, KEPT), mask=is_kept)


def rope_config(head_size: int) -> KernelConfig:
    """Return how heads of a size are placed: some 2,048 numbers a program."""
    half = max(32, next_power_of_2(head_size // 2))
    return KernelConfig(tiles={"HEADS": max(1, 1024 // half), "HALF": half}, num_warps=4, num_stages=1)


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``rotate_and_write_`` launches."""
    for dtype in _DTYPES:
        for kept in (dtype, _FLOAT8) if dtype == torch.bfloat16 else (dtype,):
            for head_size in (64, 128, 256):
                yield CompileCase(
                    kernel=_rope_kv_kernel,
                    name=f"{pointer(dtype)[1:]} to {pointer(kept)[1:]} {head_size}",
                    config=rope_config(head_size),
                    signature={
                        **dict.fromkeys(("qkv_ptr", "cos_ptr", "sin_ptr"), pointer(dtype)),
                        "rows_ptr": "*i64",
                        "cache_ptr": pointer(kept),
                        **dict.fromkeys(("token_stride", "heads", "kv_heads", "head_size"), "i32"),
                        **dict.fromkeys(("k_factor", "v_factor"), "fp32"),
                    },
                    aligned=("token_stride", "head_size"),
                    constants={"IS_SCALED": kept == _FLOAT8},
                    targets=targets_for(kept),
                )


def rotate_and_write_(
    qkv_TSD: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    rows: Tensor,
    layer_cache: Tensor,
    *,
    heads: int,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """As ``rotate_and_write_reference_``."""
    head_size, kv_heads = layer_cache.shape[-1], layer_cache.shape[2]
    others = (cos_TD, sin_TD)
    is_plain = all(x.is_contiguous() and x.dtype == qkv_TSD.dtype for x in others) and rows.is_contiguous()
    is_plain = is_plain and layer_cache.is_contiguous() and head_size % 2 == 0
    are_dense = qkv_TSD.stride(2) == 1 and qkv_TSD.stride(1) == head_size and qkv_TSD.dtype in _DTYPES
    # A cache in float8 is for bfloat16; others are converted by torch.
    is_float8 = layer_cache.dtype == _FLOAT8 and qkv_TSD.dtype == torch.bfloat16
    is_known = (is_float8 or layer_cache.dtype == qkv_TSD.dtype) and head_size <= 256
    if is_plain and are_dense and is_known and uses_triton("rope_kv", qkv_TSD):
        config = rope_config(head_size)
        launch(
            _rope_kv_kernel,
            (qkv_TSD.shape[0], -(-qkv_TSD.shape[1] // config.tiles["HEADS"])),
            config,
            qkv_ptr=qkv_TSD,
            cos_ptr=cos_TD,
            sin_ptr=sin_TD,
            rows_ptr=rows,
            cache_ptr=layer_cache,
            token_stride=qkv_TSD.stride(0),
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            k_factor=1 / k_scale,
            v_factor=1 / v_scale,
            IS_SCALED=layer_cache.dtype == _FLOAT8,
        )
        return
    compiled = native_for(qkv_TSD)
    if compiled is None or not is_plain or not qkv_TSD.is_contiguous() or layer_cache.dtype != qkv_TSD.dtype:
        rotate_and_write_reference_(
            qkv_TSD, cos_TD, sin_TD, rows, layer_cache, heads=heads, k_scale=k_scale, v_scale=v_scale
        )
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
