"""Where a step's attention finds its keys: built once a step from block tables, used by all layers of one
window.

A batch is a list of rows, each a contiguous run of positions of one sequence whose keys and values are in the
cache. Keys are divided into spans of ``span_keys`` positions, at fixed places: what a position attends to is cut
in the same way whether it is decoded, part of a chunk, or behind a cached prefix. Rows of one token (decoding)
and tiles of several tokens (prefill) go into launches of equal shape.

Where Triton's kernels attend, both kinds of rows go to these (``attention_decode``, ``attention_prefill``); on a CPU
with compiled kernels to those (``cpu.attention_paged``, ``cpu.attention_paged_prefill``).

Why torch's operations give the same bits in any company: the bits of a row of a product depend neither on how many rows
there are (in multiples of ``QUERY_UNIT``) nor on masked keys at its end, as long as at most ``SPAN_KEYS`` keys are
summed.
``tests/kernels/test_row_independence.py`` holds torch to that.

Shapes: T tokens, R rows, K KV heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .attention_items import DecodeItems, PrefillItems, decode_items, prefill_items
from .attention_prefill import prefill_tile_rows
from .backends import uses_triton_on
from .cpu.attention_decode_plan import DecodePlan, build_decode_plan
from .cpu.attention_keys import Int32Array, Int64Array, KeyLayout
from .cpu.attention_paged import PagedRows, build_paged_rows
from .cpu.attention_paged_prefill import PagedRuns, build_paged_runs
from .cpu.attention_prefill_plan import PrefillGroup, build_prefill_plan
from .mla_prefill import mla_prefill_tile_rows
from .mla_span import MlaOptions, takes_latents
from .shared_items import LEAST_ROWS, SharedItems, share_items
from .shared_prefix import shared_tile_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """The attention of one step for the layers of one window: token i sees j when 0 <= i - j < ``window``."""

    window: int | None
    decode: DecodePlan | PagedRows | DecodeItems | SharedItems | None
    prefill: tuple[PrefillGroup, ...] | PagedRuns | PrefillItems


def build_attention_plan(
    *,
    starts: Int32Array,
    counts: Int32Array,
    block_tables: Int32Array,
    block_size: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
    cache_dtype: torch.dtype | None = None,
    latent: int | None = None,
    deterministic: bool = False,
    items_on: torch.device | None = None,
    decode_room: int | None = None,
) -> AttentionPlan:
    """Build the plan of one step for one window, for queries and caches of type ``dtype``.

    ``cache_dtype``: of caches, where Triton's kernels attend and it is another one. ``latent``: of latents in the
    cache, how many numbers are values too (``latent_attention``). ``items_on``: where what those read is made, for
    whoever brings it to ``device`` with other things; None is there at once. ``decode_room``: for how many spans of
    keys of decoding rows, so that as many rows always make arrays of the same shapes; None is what they need.

    The compiled kernels give a position the same bits whatever the chunk it is computed in. Torch's operations do so
    with ``deterministic``: prefill then sums its keys span by span as decoding does. Without, tiles that see more than
    one span are computed whole, which is faster.

    Shapes: starts, counts [rows] int32, first position and number of positions of each row; block_tables
    [rows, most blocks] int32, entries beyond a row's last block are never read
    """
    tiles = _tiles(heads, head_size, latent, dtype, cache_dtype or dtype, device, deterministic=deterministic)
    if tiles is not None:
        return _plan_of_items(
            starts,
            counts,
            block_tables,
            block_size=block_size,
            heads_per_kv=heads // kv_heads,
            tiles=tiles,
            window=window,
            device=items_on or device,
            decode_room=decode_room,
        )
    layout = KeyLayout(block_size=block_size, kv_heads=kv_heads, window=window, dtype=dtype, device=device)
    starts64, counts64 = starts.astype(np.int64), counts.astype(np.int64)
    first_tokens = np.cumsum(counts64) - counts64
    single = counts64 == 1
    decode = None
    if single.any():
        decode = _decode_plan(starts64[single], first_tokens[single], block_tables[single], layout)
    prefill: tuple[PrefillGroup, ...] | PagedRuns = ()
    if not single.all():
        several = ~single
        starts64, counts64, first_tokens = starts64[several], counts64[several], first_tokens[several]
        block_tables = block_tables[several]
        prefill = build_paged_runs(
            starts=starts64, counts=counts64, first_tokens=first_tokens, block_tables=block_tables, layout=layout
        ) or build_prefill_plan(
            starts=starts64,
            counts=counts64,
            first_tokens=first_tokens,
            block_tables=block_tables,
            layout=layout,
            deterministic=deterministic,
        )
    return AttentionPlan(window=window, decode=decode, prefill=prefill)


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Rows of a prefill tile, and of one that rows share; None where kernels read spans of keys for each row."""

    rows: int
    shared_rows: int | None


def _tiles(
    heads: int,
    head_size: int,
    latent: int | None,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    device: torch.device,
    *,
    deterministic: bool,
) -> _Tiles | None:
    """Return what Triton's kernels cut; None where others attend."""
    if latent is not None:
        if not takes_latents(latent, head_size - latent) or not uses_triton_on("mla", device):
            return None
        options = MlaOptions(scale=1.0, latent=latent, deterministic=deterministic)
        return _Tiles(mla_prefill_tile_rows(heads, dtype, options), None)
    if not uses_triton_on("attention", device):
        return None
    return _Tiles(
        prefill_tile_rows(head_size, dtype, cache_dtype, deterministic=deterministic),
        shared_tile_rows(head_size, dtype, cache_dtype, deterministic=deterministic),
    )


def _plan_of_items(
    starts: Int32Array,
    counts: Int32Array,
    block_tables: Int32Array,
    *,
    block_size: int,
    heads_per_kv: int,
    tiles: _Tiles,
    window: int | None,
    device: torch.device,
    decode_room: int | None,
) -> AttentionPlan:
    """Build the plan for Triton's kernels, which cut ``tiles``; spans that rows share are found on the host."""
    longest = int((starts + counts).max(initial=0))
    # As few different widths as may be: a kernel is compiled anew for one that 16 does not divide.
    block_tables = block_tables[:, : -(-longest // (16 * block_size)) * 16]
    first_tokens = np.cumsum(counts, dtype=np.int32) - counts
    single = counts == 1
    several = ~single
    decode: DecodeItems | SharedItems | None = None
    if single.any():
        items = decode_items(
            starts[single],
            first_tokens[single],
            block_tables[single],
            window=window,
            device=device,
            capacity=decode_room,
        )
        decode = items
        if device.type == "cpu" and tiles.shared_rows is not None:
            shared = share_items(
                items, window=window, block_size=block_size, heads_per_kv=heads_per_kv, tile_rows=tiles.shared_rows
            )
            # Where nothing is shared, all that is left is the launch of a kernel; with room for any, shapes stay alike.
            may_share = decode_room is not None and int(single.sum()) >= LEAST_ROWS
            decode = shared if may_share or int(shared.tile_count_1) else items
    prefill: tuple[PrefillGroup, ...] | PrefillItems = ()
    if several.any():
        prefill = prefill_items(
            starts[several],
            counts[several],
            first_tokens[several],
            block_tables[several],
            heads_per_kv=heads_per_kv,
            tile_rows=tiles.rows,
            device=device,
        )
    return AttentionPlan(window=window, decode=decode, prefill=prefill)


def _decode_plan(
    positions: Int64Array, tokens: Int64Array, block_tables: Int32Array, layout: KeyLayout
) -> DecodePlan | PagedRows:
    lowest = layout.lowest_seen(positions)
    paged = build_paged_rows(positions, lowest, tokens, block_tables, dtype=layout.dtype, device=layout.device)
    return paged or build_decode_plan(positions, tokens, block_tables, layout)
