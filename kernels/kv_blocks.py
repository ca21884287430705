"""Whole KV blocks copied, for copy on write, and cleared: all layers at once.

Shapes: a layer's cache is [parts, num_blocks, KV heads, block size, head size], L layers; the parts are keys and
values, or one that is both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .backends import uses_triton
from .compile_case import CompileCase
from .cpu.native import native_for
from .launch import KernelConfig, jit, launch, tl
from .pointer_table import memory_at, pointer_table

_CONFIG = KernelConfig(tiles={"WORDS": 1024}, num_warps=4, num_stages=1)
_WORDS: Mapping[str, Mapping[str, Any]] = {
    "words": {"WORD": tl.int64, "ALIGNMENT": 16},
    "bytes": {"WORD": tl.uint8, "ALIGNMENT": 1},
}
"""Of what blocks consist: of words that are moved two at a time, or of bytes."""


def copy_blocks_reference(
    layer_caches: Sequence[Tensor], sources: NDArray[np.int32], targets: NDArray[np.int32]
) -> None:
    """Copy block ``sources[i]`` to ``targets[i]`` in every layer, one after the other in the order given.

    Shapes: sources, targets [copies] int32; layer_caches: one tensor a layer, all alike and of the same device
    """
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        for layer_cache in layer_caches:
            layer_cache[:, target] = layer_cache[:, source]


def clear_blocks_reference(blocks_F: Tensor, layer_caches: Sequence[Tensor]) -> None:
    """Set whole blocks of all layers to zero, so that what an earlier owner left there (perhaps not a number) can never
    be read.

    Shapes: blocks_F [blocks] int64; layer_caches: each [parts, blocks, KV heads, block size, head size], contiguous
    """
    for layer_cache in layer_caches:
        layer_cache.view(torch.uint8).index_fill_(1, blocks_F, 0)


@jit
def _copy_blocks_kernel(
    layers_ptr,
    blocks_ptr,
    copies,
    parts,
    num_blocks,
    block_words,
    WORD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WORDS: tl.constexpr,
):
    """One program copies ``WORDS`` words of one part of a block in one layer."""
    copy, part = tl.program_id(0), tl.program_id(1)
    cache_ptr = memory_at(layers_ptr + part // parts, WORD, ALIGNMENT)
    first = (part % parts).to(tl.int64) * num_blocks
    source = (first + tl.load(blocks_ptr + copy)) * block_words
    target = (first + tl.load(blocks_ptr + copies + copy)) * block_words
    words = tl.program_id(2) * WORDS + tl.arange(0, WORDS)
    is_there = words < block_words
    tl.store(cache_ptr + target + words, tl.load(cache_ptr + source + words, mask=is_there, other=0), mask=is_there)


@jit
def _clear_blocks_kernel(
    layers_ptr,
    blocks_ptr,
    parts,
    num_blocks,
    block_words,
    WORD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WORDS: tl.constexpr,
):
    """One program clears ``WORDS`` words of one part of a block in one layer."""
    part = tl.program_id(1)
    cache_ptr = memory_at(layers_ptr + part // parts, WORD, ALIGNMENT)
    block = (part % parts).to(tl.int64) * num_blocks + tl.load(blocks_ptr + tl.program_id(0))
    words = tl.program_id(2) * WORDS + tl.arange(0, WORDS)
    zeros = tl.zeros((WORDS,), cache_ptr.dtype.element_ty)
    tl.store(cache_ptr + block * block_words + words, zeros, mask=words < block_words)


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``copy_blocks`` and ``clear_blocks`` launch."""
    pointers = dict.fromkeys(("layers_ptr", "blocks_ptr"), "*i64")
    numbers = dict.fromkeys(("parts", "num_blocks", "block_words"), "i32")
    copy_signature = {**pointers, "copies": "i32", **numbers}
    for name, words in _WORDS.items():
        for kernel, signature in (
            (_copy_blocks_kernel, copy_signature),
            (_clear_blocks_kernel, {**pointers, **numbers}),
        ):
            yield CompileCase(
                kernel=kernel, name=name, config=_CONFIG, signature=signature, constants=words, aligned=("block_words",)
            )


def copy_blocks(layer_caches: Sequence[Tensor], sources: NDArray[np.int32], targets: NDArray[np.int32]) -> None:
    """As ``copy_blocks_reference``.

    Raises: ValueError without a target for each source
    """
    if len(sources) != len(targets):
        raise ValueError(f"as many targets as sources are needed, got {len(targets)} and {len(sources)}")
    by_triton = _by_triton(layer_caches)
    for first, last in _independent_runs(sources.tolist(), targets.tolist()):
        run = np.stack((sources[first:last], targets[first:last])).astype(np.int64)
        blocks_2C = torch.from_numpy(run).to(layer_caches[0].device)
        if by_triton:
            _launch(_copy_blocks_kernel, layer_caches, blocks_2C, last - first, copies=last - first)
            continue
        for layer_cache in layer_caches:
            # Torch copies float8 blocks as bytes only.
            cache = layer_cache.view(torch.uint8) if layer_cache.element_size() == 1 else layer_cache
            cache.index_copy_(1, blocks_2C[1], cache.index_select(1, blocks_2C[0]))


def clear_blocks(blocks_F: Tensor, layer_caches: Sequence[Tensor]) -> None:
    """As ``clear_blocks_reference``.

    Raises: IndexError for a block that the caches, on a CPU, do not have
    """
    first = layer_caches[0]
    if _by_triton(layer_caches):
        _launch(_clear_blocks_kernel, layer_caches, blocks_F.contiguous(), len(blocks_F))
        return
    compiled = native_for(first)
    if compiled is None:
        clear_blocks_reference(blocks_F, layer_caches)
        return
    blocks = blocks_F.numpy()
    if blocks.size and (blocks.min() < 0 or blocks.max() >= first.shape[1]):
        raise IndexError(f"blocks {blocks.min()} to {blocks.max()} of a cache of {first.shape[1]}")
    parts = np.add.outer([layer.data_ptr() for layer in layer_caches], np.arange(first.shape[0]) * first[0].nbytes)
    block_bytes = first[0, 0].nbytes
    places = np.add.outer(parts, blocks * block_bytes)
    compiled.clear(places.ctypes.data, places.size, block_bytes, torch.get_num_threads())


def _by_triton(layer_caches: Sequence[Tensor]) -> bool:
    first = layer_caches[0]
    are_alike = all(layer.shape == first.shape and layer.dtype == first.dtype for layer in layer_caches)
    return are_alike and all(layer.is_contiguous() for layer in layer_caches) and uses_triton("kv_blocks", first)


def _launch(kernel: object, layer_caches: Sequence[Tensor], blocks: Tensor, count: int, **more: int) -> None:
    first = layer_caches[0]
    block_bytes = first[0, 0].nbytes
    are_aligned = block_bytes % 16 == 0 and all(layer.data_ptr() % 16 == 0 for layer in layer_caches)
    words = _WORDS["words" if are_aligned else "bytes"]
    block_words = block_bytes // (8 if are_aligned else 1)
    launch(
        kernel,
        (count, first.shape[0] * len(layer_caches), -(-block_words // _CONFIG.tiles["WORDS"])),
        _CONFIG,
        layers_ptr=pointer_table(layer_caches),
        blocks_ptr=blocks,
        parts=first.shape[0],
        num_blocks=first.shape[1],
        block_words=block_words,
        **words,
        **more,
    )


def _independent_runs(sources: list[int], targets: list[int]) -> Iterator[tuple[int, int]]:
    # The copies of a run go side by side, or all sources are read first: it must end before a block that it has written
    # is read or written again, and before one that it reads is written.
    first = 0
    read: set[int] = set()
    written: set[int] = set()
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if source in written or target in written or target in read:
            yield first, i
            first, read, written = i, set(), set()
        read.add(source)
        written.add(target)
    if first < len(sources):
        yield first, len(sources)
