"""How keys are divided and found: spans, units of padding, rows of the cache to gather, masks.

Shapes: C items (each a run of keys that one launch attends to), K KV heads, B blocks, Q queries, L keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SPAN_KEYS = 256
UNIT_KEYS = 64
ABSENT = 1 << 60
"""A position that no query reaches."""

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLayout:
    """What all rows of a plan have in common."""

    block_size: int
    kv_heads: int
    window: int | None
    dtype: torch.dtype
    device: torch.device

    @property
    def unit_keys(self) -> int:
        """The multiple of keys that lengths are padded to: whole blocks, at least ``UNIT_KEYS`` keys."""
        return self.block_size * -(-UNIT_KEYS // self.block_size)

    @property
    def span_keys(self) -> int:
        """The keys of a span: whole units, about ``SPAN_KEYS``."""
        return self.unit_keys * max(1, SPAN_KEYS // self.unit_keys)

    def padded(self, lengths: Int64Array) -> Int64Array:
        """Return the keys that so many are padded to, at most a span.

        fp32 products of some lengths (192, for one) are cut inside and sum in another order than those of twice
        the length; powers of two are not.
        """
        units = -(-lengths // self.unit_keys)
        if self.dtype == torch.float32:
            units = 1 << np.ceil(np.log2(units)).astype(np.int64)
        return np.minimum(units * self.unit_keys, self.span_keys)

    def lowest_seen(self, positions: Int64Array) -> Int64Array:
        """Return the first position that each position sees."""
        if self.window is None:
            return np.zeros_like(positions)
        return np.maximum(positions - (self.window - 1), 0)

    def gather(self, block_tables: Int32Array, rows_C: Int64Array, first_blocks_C: Int64Array, blocks: int) -> Tensor:
        """Return the rows to gather, of a layer's keys seen as [blocks * KV heads, block size * head size].

        ``block_tables`` must be valid up to the blocks that hold keys; the caller repeats a row's own block in
        what lies beyond (``own_blocks``).

        Shapes: rows_C, first_blocks_C [items]; returns [items, KV heads, blocks] int64
        """
        blocks_CB = block_tables[rows_C[:, None], first_blocks_C[:, None] + np.arange(blocks)].astype(np.int64)
        rows_CKB = blocks_CB[:, None, :] * self.kv_heads + np.arange(self.kv_heads)[:, None]
        return torch.from_numpy(rows_CKB).to(self.device)

    def sees_all(self, positions_C: Int64Array, first_keys_C: Int64Array, keys: int) -> bool:
        """Return whether each position sees all of ``keys`` keys from its first one on.

        Shapes: positions_C, first_keys_C [items]
        """
        return bool((self.lowest_seen(positions_C) <= first_keys_C).all()) and bool(
            (positions_C >= first_keys_C + (keys - 1)).all()
        )

    def mask(self, query_positions_CQ: Int64Array, first_keys_C: Int64Array, keys: int) -> Tensor:
        """Return what is added to the scores of ``keys`` keys from each item's first one on, as ``mask_at``.

        Shapes: query_positions_CQ [items, queries]; returns [items, queries, keys] of the plan's type
        """
        first_C11 = torch.from_numpy(first_keys_C).to(self.device).view(-1, 1, 1)
        return self._mask(query_positions_CQ, first_C11 + torch.arange(keys, device=self.device))

    def mask_at(self, query_positions_CQ: Int64Array, key_positions_CL: Int64Array) -> Tensor:
        """Return what is added to scores: 0 where the query sees the key, else a number that hides it.

        The number is finite: a query that sees no key of a span gives numbers, which then count nothing. A key that is
        not there at all stands at ``ABSENT``.

        Shapes: query_positions_CQ [items, queries]; key_positions_CL [items, keys]; returns [items, queries, keys] of
        the plan's type
        """
        return self._mask(query_positions_CQ, torch.from_numpy(key_positions_CL).to(self.device).unsqueeze(1))

    def _mask(self, query_positions_CQ: Int64Array, keys_C1L: Tensor) -> Tensor:
        positions_CQ1 = torch.from_numpy(query_positions_CQ).to(self.device).unsqueeze(-1)
        hidden_CQL = keys_C1L > positions_CQ1
        if self.window is not None:
            hidden_CQL |= keys_C1L <= positions_CQ1 - self.window
        mask_CQL = torch.zeros(hidden_CQL.shape, dtype=self.dtype, device=self.device)
        return mask_CQL.masked_fill_(hidden_CQL, -6e4 if self.dtype == torch.float16 else -1e30)


def own_blocks(block_tables: Int32Array, first_blocks: Int64Array, last_blocks: Int64Array, reach: int) -> Int32Array:
    """Return the tables with ``reach`` columns, where all beyond a row's last block repeats its first one.

    A masked key must not come from another request, whose values may not even be numbers.

    Shapes: block_tables [rows, most blocks]; first_blocks, last_blocks [rows]; returns [rows, reach]
    """
    columns = np.arange(reach)
    used = columns <= last_blocks[:, None]
    columns = np.where(used & (columns >= first_blocks[:, None]), columns, first_blocks[:, None])
    return np.take_along_axis(block_tables, columns, axis=1)
