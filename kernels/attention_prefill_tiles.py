"""How prefill attention is cut into tiles, by size of a head, types and device.

The rows of a tile are the same on all devices, because items are cut on the host; the rest is what keeps a tile in
registers and shared memory there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .attention_decode import TILE_ROWS, attention_decode_configs, check_types, filled_head
from .launch import KernelConfig

# Rows of a tile by numbers of a head, whatever the device.
_ROWS = {64: 128, 128: 128, 256: 64}

# Keys of a tile, warps and stages, by numbers of a head and bytes of a cached number.
_HOPPER = {
    (64, 2): (64, 8, 5),
    (128, 2): (64, 8, 5),
    (256, 2): (32, 4, 3),
    (64, 1): (64, 8, 5),
    (128, 1): (64, 8, 5),
    (256, 1): (32, 4, 3),
}
_BLACKWELL = {**_HOPPER, (64, 2): (64, 4, 5)}
_AMPERE = {**_HOPPER, (128, 2): (64, 8, 3), (256, 2): (32, 8, 3)}
_AMD = {
    (64, 2): (64, 8, 2),
    (128, 2): (32, 8, 2),
    (256, 2): (32, 4, 2),
    (64, 1): (64, 8, 2),
    (128, 1): (32, 4, 2),
    (256, 1): (32, 4, 2),
}

TILES = {"sm_80": _AMPERE, "sm_90": _HOPPER, "sm_100": _BLACKWELL, "gfx942": _AMD}


def _tiles_of(device: torch.device) -> Mapping[tuple[int, int], tuple[int, int, int]]:
    if device.type != "cuda":
        return _HOPPER
    if torch.version.hip is not None:
        return _AMD
    major, _ = torch.cuda.get_device_capability(device)
    return _BLACKWELL if major >= 10 else _HOPPER if major == 9 else _AMPERE


def prefill_tile_rows(
    head_size: int, dtype: torch.dtype, cache_dtype: torch.dtype, *, deterministic: bool = False
) -> int:
    """Return the rows of a tile, queries times query heads of a KV head, that ``prefill_items`` is to cut into.

    Raises: ValueError for a float8 cache under other queries than bfloat16
    """
    check_types(dtype, cache_dtype)
    # Float32 numbers are not multiplied by matrix units: larger tiles gain nothing.
    by_spans = deterministic or dtype is torch.float32
    return TILE_ROWS if by_spans else _ROWS[filled_head(head_size)]


def attention_prefill_config(
    head_size: int, dtype: torch.dtype, cache_dtype: torch.dtype, device: torch.device, *, by_spans: bool
) -> KernelConfig:
    """Return how tiles are computed: by spans as decoding's are."""
    if by_spans:
        return attention_decode_configs(head_size, dtype, cache_dtype)[0]
    return swept_config(head_size, cache_dtype, _tiles_of(device))


def swept_config(
    head_size: int, cache_dtype: torch.dtype, tiles: Mapping[tuple[int, int], tuple[int, int, int]]
) -> KernelConfig:
    """Return how tiles are computed in one sweep, with the choices of a family of devices."""
    block = filled_head(head_size)
    keys, warps, stages = tiles[block, cache_dtype.itemsize]
    return KernelConfig(
        tiles={"BLOCK_M": _ROWS[block], "BLOCK_N": keys, "BLOCK_D": block}, num_warps=warps, num_stages=stages
    )
