"""Where a step's attention finds its keys: built once a step from block tables, used by all layers of one
window.

A batch is a list of rows, each a contiguous run of positions of one sequence whose keys and values are in the
cache. Keys are divided into spans of ``span_keys`` positions, at fixed places: what a position attends to is cut
in the same way whether it is decoded, part of a chunk, or behind a cached prefix. Rows of one token (decoding)
and tiles of several tokens (prefill) go into launches of equal shape.

On a CPU with compiled kernels, both kinds of rows go to these (``attention_paged``, ``attention_paged_prefill``).

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

from .cpu.attention_decode_plan import DecodePlan, build_decode_plan
from .cpu.attention_keys import Int32Array, Int64Array, KeyLayout
from .cpu.attention_paged import PagedRows, build_paged_rows
from .cpu.attention_paged_prefill import PagedRuns, build_paged_runs
from .cpu.attention_prefill_plan import PrefillGroup, build_prefill_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """The attention of one step for the layers of one window: token i sees j when 0 <= i - j < ``window``."""

    window: int | None
    decode: DecodePlan | PagedRows | None
    prefill: tuple[PrefillGroup, ...] | PagedRuns


def build_attention_plan(
    *,
    starts: Int32Array,
    counts: Int32Array,
    block_tables: Int32Array,
    block_size: int,
    kv_heads: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
    deterministic: bool = False,
) -> AttentionPlan:
    """Build the plan of one step for one window, for queries and caches of type ``dtype``.

    The compiled kernels give a position the same bits whatever the chunk it is computed in. Torch's operations do so
    with ``deterministic``: prefill then sums its keys span by span as decoding does. Without, tiles that see more than
    one span are computed whole, which is faster.

    Shapes: starts, counts [rows] int32, first position and number of positions of each row; block_tables
    [rows, most blocks] int32, entries beyond a row's last block are never read
    """
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


def _decode_plan(
    positions: Int64Array, tokens: Int64Array, block_tables: Int32Array, layout: KeyLayout
) -> DecodePlan | PagedRows:
    lowest = layout.lowest_seen(positions)
    paged = build_paged_rows(positions, lowest, tokens, block_tables, dtype=layout.dtype, device=layout.device)
    return paged or build_decode_plan(positions, tokens, block_tables, layout)
