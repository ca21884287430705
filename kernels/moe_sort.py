"""Entries (a token's choices, one each) sorted by expert, and cut into blocks of one expert each for grouped products.

The sort counts and places, both in one launch each whatever the number of entries, and leaves no choice to the order
in which programs run: there are no atomics. Its sizes depend on the number of entries alone, so it can be recorded in
a graph.

Shapes: R rows or entries, E experts, B blocks, M places of a block, C chunks of entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .compile_case import CompileCase
from .launch import KernelConfig, jit, launch, tl

MOST_EXPERTS = 512
"""The most experts that kernels sort by."""


def sort_by_expert(experts_R: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return (order, counts): which row stands where when they are sorted by expert, and how many each expert has.

    Rows of one expert keep their order.

    Shapes: experts_R [rows] int64; order [rows] int64; counts [experts] int64
    """
    return torch.argsort(experts_R, stable=True), count_by_expert(experts_R, num_experts)


def count_by_expert(experts_R: Tensor, num_experts: int) -> Tensor:
    """Return each expert's number of rows, without reading anything back from a GPU, as ``bincount`` would.

    Shapes: experts_R [rows] int64; returns [experts] int64
    """
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=experts_R.device)
    return counts_E.scatter_add_(0, experts_R, torch.ones_like(experts_R))


def unsort(sorted_RH: Tensor, order_R: Tensor) -> Tensor:
    """Return rows as they stood before they were put into ``order_R``.

    Shapes: sorted_RH [rows, hidden]; order_R [rows] int64, each row once
    """
    return torch.empty_like(sorted_RH).index_copy_(0, order_R, sorted_RH)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertBlocks:
    """Entries by expert, in blocks whose places are filled from the first.

    Shapes: entries_BM [blocks, places] int32, what stands in each place; experts_B, rows_B [blocks] int32, a block's
    expert and how many places are filled. What is in places behind these has no meaning; blocks that are not needed
    have no rows, and are the last.
    """

    entries_BM: Tensor
    experts_B: Tensor
    rows_B: Tensor


def most_blocks(entries: int, num_experts: int, places: int) -> int:
    """Return the most blocks that entries can take, however they are spread over the experts."""
    begun = min(entries, num_experts)
    return begun + (entries - begun) // places


def sort_into_blocks_reference(experts_R: Tensor, num_experts: int, places: int) -> ExpertBlocks:
    """Sort entries by expert, each expert's in their order; an expert's last block may have places left.

    Entries whose expert is ``num_experts`` or more belong to none and are left out.

    Shapes: experts_R [entries] int64
    """
    blocks = most_blocks(len(experts_R), num_experts, places)
    entries_BM = torch.zeros((blocks, places), dtype=torch.int32)
    experts_B, rows_B = (torch.zeros(blocks, dtype=torch.int32) for _ in range(2))
    block = 0
    for expert in range(num_experts):
        for own_M in (experts_R.cpu() == expert).nonzero()[:, 0].split(places):
            if len(own_M):
                entries_BM[block, : len(own_M)] = own_M
                experts_B[block], rows_B[block] = expert, len(own_M)
                block += 1
    device = experts_R.device
    return ExpertBlocks(entries_BM=entries_BM.to(device), experts_B=experts_B.to(device), rows_B=rows_B.to(device))


@jit
def _blocks_of(block_B, total_E, blocks_E, places):
    """Return each block's expert and rows, and its number among the expert's blocks; no rows behind the last."""
    last_E = tl.cumsum(blocks_E, axis=0)
    # As many experts as have all their blocks before this one come before the block's own.
    expert_B = tl.sum((last_E[None, :] <= block_B[:, None]).to(tl.int32), axis=1)
    is_own = tl.arange(0, total_E.shape[0])[None, :] == expert_B[:, None]
    nth_B = block_B - tl.sum(tl.where(is_own, (last_E - blocks_E)[None, :], 0), axis=1)
    left_B = tl.sum(tl.where(is_own, total_E[None, :], 0), axis=1) - nth_B * places
    return expert_B, tl.maximum(tl.minimum(left_B, places), 0), nth_B


@jit
def _count_entries_kernel(experts_ptr, counts_ptr, entries, chunk, experts, SUB: tl.constexpr, BLOCK_E: tl.constexpr):
    """One program counts the entries of each expert in one chunk."""
    first = tl.program_id(0) * chunk
    expert_E = tl.arange(0, BLOCK_E)
    count_E = tl.zeros((BLOCK_E,), tl.int32)
    for begin in range(first, tl.minimum(first + chunk, entries), SUB):
        entry = begin + tl.arange(0, SUB)
        expert = tl.load(experts_ptr + entry, mask=entry < entries, other=-1).to(tl.int32)
        count_E += tl.sum((expert[:, None] == expert_E[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + tl.program_id(0) * experts + expert_E, count_E, mask=expert_E < experts)


@jit
def _place_entries_kernel(
    experts_ptr,
    counts_ptr,
    entries_ptr,
    block_experts_ptr,
    block_rows_ptr,
    entries,
    chunk,
    chunks,
    experts,
    blocks,
    places,
    SUB: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program writes the entries of one chunk to their places, and describes its share of the blocks."""
    own = tl.program_id(0)
    expert_E = tl.arange(0, BLOCK_E)
    before_E = tl.zeros((BLOCK_E,), tl.int32)
    total_E = tl.zeros((BLOCK_E,), tl.int32)
    for begin in range(0, chunks, SUB):
        other = begin + tl.arange(0, SUB)
        is_there = (other < chunks)[:, None] & (expert_E < experts)[None, :]
        count = tl.load(counts_ptr + other[:, None] * experts + expert_E[None, :], mask=is_there, other=0)
        total_E += tl.sum(count, axis=0)
        before_E += tl.sum(tl.where((other < own)[:, None], count, 0), axis=0)
    blocks_E = (total_E + places - 1) // places
    place_E = (tl.cumsum(blocks_E, axis=0) - blocks_E) * places + before_E

    for begin in range(own * chunk, tl.minimum((own + 1) * chunk, entries), SUB):
        entry = begin + tl.arange(0, SUB)
        expert = tl.load(experts_ptr + entry, mask=entry < entries, other=-1).to(tl.int32)
        is_of = (expert[:, None] == expert_E[None, :]).to(tl.int32)
        nth = tl.cumsum(is_of, axis=0) - is_of
        place = tl.sum(is_of * (place_E[None, :] + nth), axis=1)
        tl.store(entries_ptr + place, entry, mask=(expert >= 0) & (expert < experts))
        place_E += tl.sum(is_of, axis=0)

    share = (blocks + chunks - 1) // chunks
    for begin in range(own * share, tl.minimum((own + 1) * share, blocks), SUB):
        block = begin + tl.arange(0, SUB)
        expert, rows, _ = _blocks_of(block, total_E, blocks_E, places)
        is_own = block < tl.minimum((own + 1) * share, blocks)
        tl.store(block_experts_ptr + block, expert, mask=is_own)
        tl.store(block_rows_ptr + block, rows, mask=is_own)


@jit
def _cut_rows_kernel(
    counts_ptr,
    entries_ptr,
    block_experts_ptr,
    block_rows_ptr,
    experts,
    places,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program describes one block of rows that are sorted already."""
    block = tl.program_id(0)
    expert_E = tl.arange(0, BLOCK_E)
    total_E = tl.load(counts_ptr + expert_E, mask=expert_E < experts, other=0).to(tl.int32)
    expert, rows, nth = _blocks_of(block + tl.zeros((1,), tl.int32), total_E, (total_E + places - 1) // places, places)
    first = tl.sum(tl.where(expert_E < expert, total_E, 0), axis=0) + nth * places
    tl.store(block_experts_ptr + block + tl.zeros((1,), tl.int32), expert)
    tl.store(block_rows_ptr + block + tl.zeros((1,), tl.int32), rows)
    place = tl.arange(0, BLOCK_M)
    tl.store(entries_ptr + block * places + place, first + place, mask=place < rows)


_SIZES = (128, MOST_EXPERTS)
_MOST_CHUNKS = 128
_MOST_PLACES = 128


def sort_config(num_experts: int) -> KernelConfig:
    """Return how entries are sorted: tiles of 4,096 pairs of an entry and an expert. Raises: ValueError"""
    size = next((size for size in _SIZES if num_experts <= size), None)
    if size is None:
        raise ValueError(f"experts_R has {num_experts} experts, kernels sort by {MOST_EXPERTS} at most")
    return KernelConfig(
        tiles={"SUB": 4096 // size, "BLOCK_E": size}, num_warps=8 if size == MOST_EXPERTS else 4, num_stages=1
    )


_CUT_CONFIG = KernelConfig(tiles={"BLOCK_M": _MOST_PLACES, "BLOCK_E": MOST_EXPERTS}, num_warps=4, num_stages=1)


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``sort_into_blocks`` and ``cut_into_blocks`` launch."""
    blocks = dict.fromkeys(("entries_ptr", "block_experts_ptr", "block_rows_ptr"), "*i32")
    for size in _SIZES:
        yield CompileCase(
            kernel=_count_entries_kernel,
            name=f"{size} experts",
            config=sort_config(size),
            signature={
                "experts_ptr": "*i64",
                "counts_ptr": "*i32",
                **dict.fromkeys(("entries", "chunk", "experts"), "i32"),
            },
        )
        yield CompileCase(
            kernel=_place_entries_kernel,
            name=f"{size} experts",
            config=sort_config(size),
            signature={
                "experts_ptr": "*i64",
                "counts_ptr": "*i32",
                **blocks,
                **dict.fromkeys(("entries", "chunk", "chunks", "experts", "blocks", "places"), "i32"),
            },
        )
    yield CompileCase(
        kernel=_cut_rows_kernel,
        name=f"{MOST_EXPERTS} experts",
        config=_CUT_CONFIG,
        signature={"counts_ptr": "*i64", **blocks, "experts": "i32", "places": "i32"},
    )


def sort_into_blocks(experts_R: Tensor, num_experts: int, places: int) -> ExpertBlocks:
    """As ``sort_into_blocks_reference``, by kernels. Raises: ValueError"""
    config = sort_config(num_experts)
    if experts_R.dim() != 1 or experts_R.dtype != torch.int64:
        raise ValueError(f"experts_R must be [entries] int64, got {list(experts_R.shape)} {experts_R.dtype}")
    experts_R = experts_R.contiguous()
    entries, device = len(experts_R), experts_R.device
    blocks = most_blocks(entries, num_experts, places)
    sub = config.tiles["SUB"]
    chunk = sub * max(1, -(-entries // (sub * _MOST_CHUNKS)))
    chunks = -(-entries // chunk)
    counts_CE = torch.empty((chunks, num_experts), dtype=torch.int32, device=device)
    found = _empty_blocks(blocks, places, device)
    shared = {"experts_ptr": experts_R, "counts_ptr": counts_CE, "entries": entries, "experts": num_experts}
    launch(_count_entries_kernel, (chunks,), config, **shared, chunk=chunk)
    launch(
        _place_entries_kernel,
        (chunks,),
        config,
        **shared,
        chunk=chunk,
        chunks=chunks,
        blocks=blocks,
        places=places,
        entries_ptr=found.entries_BM,
        block_experts_ptr=found.experts_B,
        block_rows_ptr=found.rows_B,
    )
    return found


def cut_into_blocks(counts_E: Tensor, rows: int, places: int) -> ExpertBlocks:
    """Return the blocks of rows that are sorted by expert already; rows behind the last counted one are in none.

    Shapes: counts_E [experts] int64
    Raises: ValueError
    """
    num_experts = len(counts_E)
    if counts_E.dtype != torch.int64 or num_experts > MOST_EXPERTS or not 0 < places <= _MOST_PLACES:
        raise ValueError(
            f"counts_E must be at most [{MOST_EXPERTS}] int64, and blocks of at most {_MOST_PLACES} places, "
            f"got [{num_experts}] {counts_E.dtype}, {places}"
        )
    found = _empty_blocks(most_blocks(rows, num_experts, places), places, counts_E.device)
    launch(
        _cut_rows_kernel,
        (len(found.rows_B),),
        _CUT_CONFIG,
        counts_ptr=counts_E.contiguous(),
        entries_ptr=found.entries_BM,
        block_experts_ptr=found.experts_B,
        block_rows_ptr=found.rows_B,
        experts=num_experts,
        places=places,
    )
    return found


def _empty_blocks(blocks: int, places: int, device: torch.device) -> ExpertBlocks:
    return ExpertBlocks(
        entries_BM=torch.empty((blocks, places), dtype=torch.int32, device=device),
        experts_B=torch.empty(blocks, dtype=torch.int32, device=device),
        rows_B=torch.empty(blocks, dtype=torch.int32, device=device),
    )
