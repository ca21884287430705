"""Decode attention by the compiled kernel, which reads keys and values where they are in the cache.

Rows are cut into spans of keys at fixed positions; a row's spans are merged in their order, so its bits depend on its
own keys alone. Prefill (``attention_paged_prefill``) gives the same bits.

What a step's layers have in common is one structure of pointers: a layer sets four of its fields. The arrays that it
points to are kept beside it.

Shapes: R rows, C items (a row's spans, one row after the other), B blocks, K KV heads, D head size.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..attention_span import AttentionOptions
from .native import DecodeJob, Native, PrefillJob, native

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedRows:
    """The rows of one token of a step, and their spans.

    Shapes: positions_R, lowest_seen_R, tokens_R [rows] int64; tables_RB int32, contiguous; item_rows_C [items] int32;
    first_items_R1 [rows + 1] int32, the items before each row's
    """

    positions_R: Int64Array
    lowest_seen_R: Int64Array
    tokens_R: Int64Array
    tables_RB: Int32Array
    item_rows_C: Int32Array
    first_items_R1: Int32Array
    compiled: Native


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedPaged:
    """The rows, ready for any layer of the same shape. ``memory``: what the job points to.

    Shapes: partials, open: see ``struct decode_job``
    """

    job: DecodeJob
    memory: tuple[PagedRows, Tensor, Tensor]


def build_paged_rows(
    positions: Int64Array,
    lowest_seen: Int64Array,
    tokens: Int64Array,
    block_tables: Int32Array,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> PagedRows | None:
    """Return the rows at ``positions``, which stand at ``tokens`` in the batch; None if the compiled kernel does not
    serve their type.

    Shapes: positions, lowest_seen, tokens [rows] int64; block_tables [rows, most blocks]
    """
    compiled = native() if device.type == "cpu" and dtype in (torch.bfloat16, torch.float32) else None
    if compiled is None:
        return None
    spans = positions // compiled.span_keys - lowest_seen // compiled.span_keys + 1
    first_items_R1 = np.zeros(len(spans) + 1, np.int32)
    np.cumsum(spans, out=first_items_R1[1:])
    return PagedRows(
        positions_R=np.ascontiguousarray(positions),
        lowest_seen_R=np.ascontiguousarray(lowest_seen),
        tokens_R=np.ascontiguousarray(tokens),
        tables_RB=np.ascontiguousarray(block_tables, np.int32),
        item_rows_C=np.repeat(np.arange(len(spans), dtype=np.int32), spans),
        first_items_R1=first_items_R1,
        compiled=compiled,
    )


def prepare_paged(rows: PagedRows, layer_cache: Tensor, *, heads: int) -> PreparedPaged:
    """Make what the layers of a step have in common, for ``heads`` query heads. ``layer_cache``: any layer's.

    Raises: IndexError for a block that the cache does not have
    """
    parts, num_blocks, kv_heads, block_size, head_size = layer_cache.shape
    check_blocks(rows.tables_RB, rows.lowest_seen_R, rows.positions_R, num_blocks=num_blocks, block_size=block_size)
    items, group = len(rows.item_rows_C), heads // kv_heads
    partials = torch.empty(items * heads * rows.compiled.partial_numbers(head_size), dtype=torch.float32)
    spans_R = torch.from_numpy(np.diff(rows.first_items_R1))
    open_RK = spans_R.unsqueeze(1).expand(-1, kv_heads).contiguous()
    job = DecodeJob(
        tables=rows.tables_RB.ctypes.data,
        item_rows=rows.item_rows_C.ctypes.data,
        first_items=rows.first_items_R1.ctypes.data,
        tokens=rows.tokens_R.ctypes.data,
        positions=rows.positions_R.ctypes.data,
        lowest_seen=rows.lowest_seen_R.ctypes.data,
        partials=partials.data_ptr(),
        open=open_RK.data_ptr(),
        table_columns=rows.tables_RB.shape[1],
        # What stands between keys and values.
        num_blocks=(parts - 1) * num_blocks,
        kv_heads=kv_heads,
        group=group,
        block_size=block_size,
        head_size=head_size,
        items=items,
        bf16=layer_cache.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
    )
    return PreparedPaged(job=job, memory=(rows, partials, open_RK))


def renew_paged(kept: PreparedPaged, fresh: PreparedPaged) -> None:
    """Let a prepared step stand for another of as many rows, as long as that one is kept; a recording has its address.

    What a layer sets is set by the next.
    """
    ctypes.memmove(ctypes.byref(kept.job), ctypes.byref(fresh.job), ctypes.sizeof(DecodeJob))


def check_blocks(
    tables_RB: Int32Array, lowest_R: Int64Array, highest_R: Int64Array, *, num_blocks: int, block_size: int
) -> None:
    """Refuse blocks that are not there: the compiled kernels read wherever they are told to.

    Shapes: tables_RB [rows, most blocks]; lowest_R, highest_R [rows], the first and last positions that are read
    Raises: IndexError
    """
    columns_B = np.arange(tables_RB.shape[1])
    firsts_R1, lasts_R1 = lowest_R[:, None] // block_size, highest_R[:, None] // block_size
    if lasts_R1.max(initial=0) > tables_RB.shape[1] - 1:
        raise IndexError(f"position {highest_R.max()} is not in a table of {tables_RB.shape[1]} blocks")
    read = tables_RB[(firsts_R1 <= columns_B) & (columns_B <= lasts_R1)]
    if read.size and (read.min() < 0 or read.max() >= num_blocks):
        raise IndexError(f"blocks {read.min()} to {read.max()} are read from a cache of {num_blocks}")


def attend_paged(
    q_TND: Tensor, layer_cache: Tensor, prepared: PreparedPaged, options: AttentionOptions, *, out_TND: Tensor
) -> None:
    """Compute the attention of the prepared rows into their places in ``out_TND``.

    Shapes: q_TND [tokens, heads, head size], heads side by side; out_TND like it, contiguous; layer_cache [2, blocks,
    KV heads, block size, head size] contiguous; all of one type
    """
    set_layer(prepared.job, q_TND, layer_cache, options, out_TND=out_TND)
    prepared.memory[0].compiled.attend_decode(prepared.job)


def set_layer(
    job: DecodeJob | PrefillJob, q_TND: Tensor, layer_cache: Tensor, options: AttentionOptions, *, out_TND: Tensor
) -> None:
    """Let a prepared step's job work on one layer; its window was planned. Shapes: as of ``attend_paged``"""
    assert q_TND.stride(1) == q_TND.shape[2] and q_TND.dtype == layer_cache.dtype == out_TND.dtype
    assert layer_cache.is_contiguous() and out_TND.is_contiguous()
    job.query_stride = q_TND.stride(0)
    job.queries, job.cache, job.out = q_TND.data_ptr(), layer_cache.data_ptr(), out_TND.data_ptr()
    job.scale, job.soft_cap, job.sinks = options.scale, options.soft_cap or 0.0, None
    if options.sinks_N is not None:
        assert options.sinks_N.dtype == torch.float32 and options.sinks_N.is_contiguous()
        assert len(options.sinks_N) == q_TND.shape[1]
        job.sinks = options.sinks_N.data_ptr()
