"""Where a step's attention finds its keys: built once a step from block tables, used by all layers of one
window.

A batch is a list of rows, each a contiguous run of positions of one sequence whose keys and values are in the
cache. A row of one token (decoding) is cut into chunks of ``DECODE_CHUNK`` keys; the chunks of all rows are
computed alike and added up per row, so what a row gives does not depend on the other rows. A row of several
tokens (prefill) is computed by itself, in tiles of queries.

Shapes: R decode rows, C chunks, K KV heads, B blocks of a chunk, L keys of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DECODE_CHUNK = 128
KEY_UNIT = 64

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """The rows of one token.

    Shapes: tokens_R [rows] int64, their places in the batch; chunk_rows_C [chunks] int64, the row of each
    chunk; gather_CKB [chunks, KV heads, blocks] int64, rows of a layer's keys seen as [blocks * KV heads,
    block size * head size]; mask_CL [chunks, keys] float32, 0 or -inf. All contiguous. Every chunk has a key
    that is not masked.
    """

    tokens_R: Tensor
    chunk_rows_C: Tensor
    gather_CKB: Tensor
    mask_CL: Tensor

    @property
    def one_chunk_each(self) -> bool:
        """Say whether every row has a single chunk, in order."""
        return self.chunk_rows_C.shape[0] == self.tokens_R.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRow:
    """A row of several tokens.

    Shapes: gather_KB [KV heads, blocks] int64, as in ``DecodePlan``, padded to whole units of keys
    Units: all in tokens; ``first_token`` is the place in the batch, ``start`` the position of that token,
    ``first_key`` the position of the first key gathered
    """

    first_token: int
    count: int
    start: int
    first_key: int
    gather_KB: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """The attention of one step for the layers of one window: token i sees j when 0 <= i - j < ``window``."""

    window: int | None
    block_size: int
    decode: DecodePlan | None
    prefill: tuple[PrefillRow, ...]


def key_unit(block_size: int) -> int:
    """Return the multiple of keys that prefill works in: whole blocks, at least ``KEY_UNIT`` keys."""
    return block_size * -(-KEY_UNIT // block_size)


def build_attention_plan(
    *,
    starts: Int32Array,
    counts: Int32Array,
    block_tables: Int32Array,
    block_size: int,
    kv_heads: int,
    window: int | None,
    device: torch.device,
) -> AttentionPlan:
    """Build the plan of one step for one window.

    Shapes: starts, counts [rows] int32, first position and number of positions of each row; block_tables
    [rows, most blocks] int32, entries beyond a row's last block are never read
    """
    starts64, counts64 = starts.astype(np.int64), counts.astype(np.int64)
    first_tokens = np.cumsum(counts64) - counts64
    decode_rows = np.flatnonzero(counts64 == 1)
    decode = None
    if len(decode_rows):
        decode = _decode_plan(
            positions=starts64[decode_rows],
            tokens=first_tokens[decode_rows],
            block_tables=block_tables[decode_rows],
            block_size=block_size,
            kv_heads=kv_heads,
            window=window,
            device=device,
        )
    prefill = tuple(
        _prefill_row(
            first_token=int(first_tokens[row]),
            count=int(counts64[row]),
            start=int(starts64[row]),
            blocks=block_tables[row],
            block_size=block_size,
            kv_heads=kv_heads,
            window=window,
            device=device,
        )
        for row in np.flatnonzero(counts64 > 1)
    )
    return AttentionPlan(window=window, block_size=block_size, decode=decode, prefill=prefill)


def _decode_plan(
    *,
    positions: Int64Array,
    tokens: Int64Array,
    block_tables: Int32Array,
    block_size: int,
    kv_heads: int,
    window: int | None,
    device: torch.device,
) -> DecodePlan:
    chunk_blocks = max(1, DECODE_CHUNK // block_size)
    lowest = np.zeros_like(positions) if window is None else np.maximum(positions - (window - 1), 0)
    first_blocks, last_blocks = lowest // block_size, positions // block_size
    chunks = -(-(last_blocks - first_blocks + 1) // chunk_blocks)
    rows_C = np.repeat(np.arange(len(positions)), chunks)
    ordinals_C = np.arange(len(rows_C)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
    chunk_first_C = first_blocks[rows_C] + ordinals_C * chunk_blocks
    indices_CB = chunk_first_C[:, None] + np.arange(chunk_blocks)
    # Places beyond the row's last block repeat a block of its own: a masked key must not come from another
    # request, whose values may not even be numbers.
    indices_CB = np.where(indices_CB <= last_blocks[rows_C, None], indices_CB, first_blocks[rows_C, None])
    blocks_CB = block_tables[rows_C[:, None], indices_CB].astype(np.int64)
    gather_CKB = blocks_CB[:, None, :] * kv_heads + np.arange(kv_heads)[None, :, None]
    keys_CL = (chunk_first_C * block_size)[:, None] + np.arange(chunk_blocks * block_size)
    seen_CL = (keys_CL <= positions[rows_C, None]) & (keys_CL >= lowest[rows_C, None])
    mask_CL = np.where(seen_CL, np.float32(0), np.float32(-np.inf))
    return DecodePlan(
        tokens_R=torch.from_numpy(tokens).to(device),
        chunk_rows_C=torch.from_numpy(rows_C).to(device),
        gather_CKB=torch.from_numpy(gather_CKB).to(device),
        mask_CL=torch.from_numpy(mask_CL).to(device),
    )


def _prefill_row(
    *,
    first_token: int,
    count: int,
    start: int,
    blocks: Int32Array,
    block_size: int,
    kv_heads: int,
    window: int | None,
    device: torch.device,
) -> PrefillRow:
    lowest = 0 if window is None else max(0, start - (window - 1))
    first_block, last_block = lowest // block_size, (start + count - 1) // block_size
    unit_blocks = key_unit(block_size) // block_size
    padded = unit_blocks * -(-(last_block - first_block + 1) // unit_blocks)
    indices_B = first_block + np.arange(padded)
    indices_B[indices_B > last_block] = first_block
    gather_KB = blocks[indices_B].astype(np.int64)[None, :] * kv_heads + np.arange(kv_heads)[:, None]
    return PrefillRow(
        first_token=first_token,
        count=count,
        start=start,
        first_key=first_block * block_size,
        gather_KB=torch.from_numpy(gather_KB).to(device),
    )
