"""Attention over a paged cache: decoding at several batches and lengths, and prefill of prompts and chunks.

Torch's ways get keys and values side by side and of one length, without pages: the best that it can be given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from slipstream.kernels.attention import paged_attention, prepare_attention
from slipstream.kernels.attention_decode import decode_attention
from slipstream.kernels.attention_items import decode_items, prefill_items
from slipstream.kernels.attention_plan import build_attention_plan
from slipstream.kernels.attention_prefill import prefill_attention, prefill_tile_rows
from slipstream.kernels.attention_span import AttentionOptions
from slipstream.kernels.cpu.attention_workspace import AttentionWorkspace

from .case import KernelCase, Run

_DTYPE = torch.bfloat16
_FLOAT8 = torch.float8_e4m3fn
_BLOCK_SIZE, _HEAD_SIZE = 16, 128


def cases(device: torch.device) -> Iterator[KernelCase]:
    """Yield layers of 32 and 64 query heads with 8 KV heads of 128."""
    if device.type != "cuda":
        yield _decode(_Rows(8, 1023, 1, heads=16, device=device))
        yield _prefill(_Rows(1, 0, 512, heads=16, device=device))
        return
    for heads, rows, keys in (
        (32, 128, 1024),
        (32, 1, 8192),
        (32, 32, 8192),
        (32, 1, 32768),
        (32, 32, 32768),
        (64, 32, 8192),
        (64, 8, 32768),
    ):
        yield _decode(_Rows(rows, keys - 1, 1, heads=heads, device=device))
    yield _decode(_Rows(32, 8191, 1, heads=32, cache_dtype=_FLOAT8, device=device))
    for heads, rows, start, count in (
        (32, 1, 0, 8192),
        (32, 16, 0, 1024),
        (32, 4, 6144, 2048),
        (32, 16, 30720, 512),
        (64, 1, 0, 8192),
    ):
        yield _prefill(_Rows(rows, start, count, heads=heads, device=device))


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of ``count`` tokens behind ``start`` cached ones."""

    rows: int
    start: int
    count: int
    heads: int
    device: torch.device
    cache_dtype: torch.dtype = _DTYPE
    kv_heads: int = 8

    @property
    def keys(self) -> int:
        return self.start + self.count

    @property
    def flops(self) -> int:
        """Two products of each query head with each key that it sees."""
        seen = self.count * self.start + self.count * (self.count + 1) // 2
        return 4 * self.rows * self.heads * _HEAD_SIZE * seen

    @property
    def bytes(self) -> int:
        queries = 2 * self.rows * self.count * self.heads * _HEAD_SIZE * _DTYPE.itemsize
        return queries + 2 * self.rows * self.kv_heads * self.keys * _HEAD_SIZE * self.cache_dtype.itemsize

    def tables(self) -> np.ndarray:
        """Return random block tables, as a cache that is in use has them."""
        blocks = -(-self.keys // _BLOCK_SIZE)
        return np.random.default_rng(0).permutation(self.rows * blocks).reshape(self.rows, blocks).astype(np.int32)

    def cache(self) -> Tensor:
        blocks = self.rows * -(-self.keys // _BLOCK_SIZE)
        shape = (2, blocks, self.kv_heads, _BLOCK_SIZE, _HEAD_SIZE)
        return torch.randn(shape, dtype=_DTYPE, device=self.device).to(self.cache_dtype)

    def queries(self) -> Tensor:
        return torch.randn(self.rows * self.count, self.heads, _HEAD_SIZE, dtype=_DTYPE, device=self.device)

    def by_torch(self) -> dict[str, Run]:
        """Return torch's ways; a float8 cache they do not take."""
        q = torch.randn(self.rows, self.heads, self.count, _HEAD_SIZE, dtype=_DTYPE, device=self.device)
        k, v = (
            torch.randn(self.rows, self.kv_heads, self.keys, _HEAD_SIZE, dtype=_DTYPE, device=self.device)
            for _ in range(2)
        )
        ways: dict[str, Run] = {"sdpa": partial(self._sdpa, q, k, v)}
        if self.device.type == "cuda":
            ways["flex"] = self._flex(q, k, v)
        return ways

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.count == 1:
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)
        if self.start == 0:
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        # Without a mask it computes more than is asked for, and faster than with one.
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def _flex(self, q: Tensor, k: Tensor, v: Tensor) -> Run:
        compiled: list[Callable[[], Tensor]] = []

        def run() -> Tensor:
            if not compiled:
                compiled.append(self._compiled_flex(q, k, v))
            return compiled[0]()

        return run

    def _compiled_flex(self, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # noqa: PLC0415 (GPUs only)

        start = self.start

        def is_seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return start + query >= key

        mask = create_block_mask(is_seen, None, None, self.count, self.keys, device=str(self.device))
        return partial(torch.compile(flex_attention, dynamic=False), q, k, v, block_mask=mask, enable_gqa=True)


def _decode(rows: _Rows) -> KernelCase:
    q_TND, cache, tables = rows.queries(), rows.cache(), rows.tables()
    run: Run
    if rows.device.type == "cuda":
        positions, tokens = np.full(rows.rows, rows.start), np.arange(rows.rows)
        items = decode_items(positions, tokens, tables, window=None, device=rows.device)
        options = AttentionOptions(scale=_HEAD_SIZE**-0.5)
        run = partial(decode_attention, q_TND, cache, items, options, torch.empty_like(q_TND))
    else:
        run = _as_the_engine(rows, q_TND, cache, tables)
    is_long = rows.keys >= 8192 and rows.rows > 1
    return KernelCase(
        operation="attention_decode",
        shape=f"{rows.rows} x {rows.keys}, {rows.heads}/{rows.kv_heads} heads",
        dtype=rows.cache_dtype,
        run=run,
        bytes=rows.bytes,
        flops=rows.flops,
        baselines=rows.by_torch(),
        wanted=0.85 if is_long else None,
    )


def _prefill(rows: _Rows) -> KernelCase:
    q_TND, cache, tables = rows.queries(), rows.cache(), rows.tables()
    run: Run
    if rows.device.type == "cuda":
        items = prefill_items(
            np.full(rows.rows, rows.start),
            np.full(rows.rows, rows.count),
            np.arange(rows.rows) * rows.count,
            tables,
            heads_per_kv=rows.heads // rows.kv_heads,
            tile_rows=prefill_tile_rows(_HEAD_SIZE, _DTYPE, rows.cache_dtype),
            device=rows.device,
        )
        options = AttentionOptions(scale=_HEAD_SIZE**-0.5)
        run = partial(prefill_attention, q_TND, cache, items, options, torch.empty_like(q_TND))
    else:
        run = _as_the_engine(rows, q_TND, cache, tables)
    return KernelCase(
        operation="attention_prefill",
        shape=f"{rows.rows} x {rows.count} at {rows.start}, {rows.heads}/{rows.kv_heads} heads",
        dtype=rows.cache_dtype,
        run=run,
        bytes=rows.bytes,
        flops=rows.flops,
        baselines=rows.by_torch(),
        wanted=0.45,
    )


def _as_the_engine(rows: _Rows, q_TND: Tensor, cache: Tensor, tables: np.ndarray) -> Run:
    """Return the attention of a layer on a CPU."""
    plan = build_attention_plan(
        starts=np.full(rows.rows, rows.start, np.int32),
        counts=np.full(rows.rows, rows.count, np.int32),
        block_tables=tables,
        block_size=_BLOCK_SIZE,
        heads=rows.heads,
        kv_heads=rows.kv_heads,
        head_size=_HEAD_SIZE,
        window=None,
        dtype=_DTYPE,
        device=rows.device,
    )
    workspace = AttentionWorkspace(dtype=_DTYPE, device=rows.device)
    prepared = prepare_attention(plan, cache, tokens=len(q_TND), heads=rows.heads, workspace=workspace)
    return partial(paged_attention, q_TND, cache, prepared, scale=_HEAD_SIZE**-0.5)
