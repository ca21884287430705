"""Parts of a sum, added up as a tree: a shape that does not depend on how many ranks hold the parts.

What is summed over the inputs of a layer is cut into ``LEAVES`` equal chunks, whoever computes them. Neighbours are
added first, then neighbouring sums, to the last one, in float32, and that is rounded once. A rank of 2, 4 or 8 holds
whole subtrees, so sums of subtrees are added as if one rank had them all: the same bits.

Shapes: N parts (1, 2, 4 or 8), X numbers of a part, of any shape.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .backends import uses_triton
from .compile_case import CompileCase, pointer
from .cpu.native import native_for
from .launch import KernelConfig, jit, launch, tl
from .tiles import rounded

LEAVES = 8
"""Chunks of a sum: as many ranks can share it at most."""


def subtree_leaves(ranks: int) -> int:
    """Return how many chunks each of so many ranks holds; 0 where ranks do not hold whole subtrees."""
    return LEAVES // ranks if ranks in (1, 2, 4, 8) else 0


def add_pairs_reference(parts_NX: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of the parts as ``dtype``: pairs of neighbours, pairs of their sums, and so on.

    Shapes: parts_NX [parts, ...] float32; returns [...]
    """
    while parts_NX.shape[0] > 1:
        parts_NX = parts_NX[0::2] + parts_NX[1::2]
    return parts_NX[0].to(dtype)


@jit
def add_leaf(leaf: tl.constexpr, acc, one, two, four):
    """Add the next leaf's sum to a tree: (total so far, where it ends a subtree; sums of 1, 2 and 4 leaves that wait).

    Leaves come in their order; after 1, 2, 4 or 8 of them the first value is the sum of all.
    """
    if leaf % 2 == 0:
        one = acc
    else:
        acc = one + acc
        if leaf % 4 == 1:
            two = acc
        else:
            acc = two + acc
            if leaf % 8 == 3:
                four = acc
            else:
                acc = four + acc
    return acc, one, two, four


@jit
def _add_pairs_kernel(parts_ptr, out_ptr, numbers, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """One program adds up a run of numbers of all parts."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = at < numbers
    part = tl.load(parts_ptr + at, mask=is_there, other=0.0)
    total, one, two, four = add_leaf(0, part, part, part, part)
    for leaf in tl.static_range(1, PARTS):
        part = tl.load(parts_ptr + leaf * numbers + at, mask=is_there, other=0.0)
        total, one, two, four = add_leaf(leaf, part, one, two, four)
    tl.store(out_ptr + at, rounded(total, out_ptr.dtype.element_ty), mask=is_there)


_CONFIG = KernelConfig(tiles={"BLOCK": 1024}, num_warps=4, num_stages=1)


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``add_stacked`` launches, with the most parts."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield CompileCase(
            kernel=_add_pairs_kernel,
            name=f"{LEAVES} parts to {pointer(dtype)[1:]}",
            config=_CONFIG,
            signature={"parts_ptr": "*fp32", "out_ptr": pointer(dtype), "numbers": "i64"},
            constants={"PARTS": LEAVES},
        )


def add_stacked(parts_NX: Tensor, dtype: torch.dtype) -> Tensor:
    """As ``add_pairs_reference``.

    Shapes: parts_NX [1, 2, 4 or 8 parts, ...] float32
    Raises: ValueError for another number of parts or another type
    """
    _check(parts_NX.shape[0], parts_NX.dtype)
    if parts_NX.shape[0] == 1 or not uses_triton("tree_sum", parts_NX):
        return add_pairs(parts_NX.unbind(0), dtype)
    parts_NX = parts_NX.contiguous()
    out_X = torch.empty(parts_NX.shape[1:], dtype=dtype, device=parts_NX.device)
    launch(
        _add_pairs_kernel,
        (-(-out_X.numel() // 1024),),
        _CONFIG,
        parts_ptr=parts_NX,
        out_ptr=out_X,
        numbers=out_X.numel(),
        PARTS=parts_NX.shape[0],
    )
    return out_X


def add_pairs(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the sum of parts that are tensors of their own; otherwise as ``add_stacked``.

    Shapes: parts, each [...] float32
    """
    _check(len(parts), parts[0].dtype)
    first = parts[0]
    compiled = native_for(first) if first.dim() and dtype in (torch.float32, torch.bfloat16) else None
    if compiled is not None and len(parts) > 1 and all(part.is_contiguous() for part in parts):
        out_X = first.new_empty(first.shape, dtype=dtype)
        addresses = (ctypes.c_void_p * len(parts))(*(part.data_ptr() for part in parts))
        compiled.add_pairs(
            addresses, out_X.data_ptr(), len(parts), out_X.numel(), dtype == torch.bfloat16, torch.get_num_threads()
        )
        return out_X
    sums = list(parts)
    while len(sums) > 1:
        sums = [left + right for left, right in zip(sums[0::2], sums[1::2], strict=True)]
    return sums[0].to(dtype)


def _check(parts: int, dtype: torch.dtype) -> None:
    if parts not in (1, 2, 4, 8) or dtype != torch.float32:
        raise ValueError(f"parts: 1, 2, 4 or {LEAVES} of float32 make a tree, got {parts} of {dtype}")
