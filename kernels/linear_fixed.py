"""The matrix product with weights on GPUs in one order of sums, whatever the number of rows: for ``deterministic``.

Libraries choose their ways by the sizes of a product, so a row's bits depend on its company. Here tiles are of one size
for a type, each output adds up its inputs in their order, and nothing is split otherwise. Neither the rows nor the
outputs that a rank has decide anything that changes bits.

Sums over ``leaves`` chunks of the inputs are trees (``tree_sum``). Where there are few tiles each chunk is a program's
own, otherwise one program computes up to four of them one after the other; a second kernel adds up what is left. Tiles
and order are the same, and so are the bits.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .backends import uses_triton
from .compile_case import CompileCase, pointer
from .launch import KernelConfig, jit, launch, processors, tl
from .tiles import dot, rounded
from .tree_sum import LEAVES, add_leaf, add_pairs_reference, add_stacked

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fixed_linear_reference(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, *, leaves: int, dtype: torch.dtype
) -> Tensor:
    """Return ``x @ weight.T + bias``: the inputs in equal chunks whose float32 products are added as a tree.

    The bias is added to the first chunk's sum.

    Shapes: x_TI [tokens, inputs]; weight_OI [outputs, inputs]; bias_O [outputs]; returns [tokens, outputs] of ``dtype``
    """
    x_LTI = x_TI.float().unflatten(1, (leaves, -1)).transpose(0, 1)
    weight_LIO = weight_OI.float().unflatten(1, (leaves, -1)).permute(1, 2, 0)
    parts_LTO = x_LTI @ weight_LIO
    if bias_O is not None:
        parts_LTO[0] += bias_O.float()
    return add_pairs_reference(parts_LTO, dtype)


@jit
def _leaf_sum(
    x_ptr,
    weight_ptr,
    first,
    size,
    x_rows,
    w_rows,
    x_is_there,
    w_is_there,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return a tile's products summed over the inputs from ``first`` on, ``size`` of them, in their order."""
    columns = tl.arange(0, BLOCK_K)
    x_tile = x_ptr + x_rows[:, None] + (first + columns)[None, :]
    w_tile = weight_ptr + w_rows[None, :] + (first + columns)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in tl.range(0, size, BLOCK_K):
        is_there = columns < size - at
        x = tl.load(x_tile, mask=x_is_there[:, None] & is_there[None, :], other=0.0)
        w = tl.load(w_tile, mask=w_is_there[None, :] & is_there[:, None], other=0.0)
        acc = dot(x, w, acc)
        x_tile += BLOCK_K
        w_tile += BLOCK_K
    return acc


@jit
def _fixed_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    outputs,
    leaves,
    leaf_units,
    UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LEAVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program computes one tile of outputs: the tree over LEAVES leaves, the first being LEAVES times its place on
    the second axis, whose sums stand behind one another in ``out``.

    A leaf has ``leaf_units`` times UNIT inputs: as a product of a constant, the compiler sees how they are aligned.
    Tiles of the same outputs are neighbours, so that a weight is read from memory once.
    """
    leaf_size = leaf_units * UNIT
    inputs = leaf_size * leaves
    row_tiles = tl.cdiv(tokens, BLOCK_M)
    tile = tl.program_id(0)
    part = tl.program_id(1)
    rows = (tile % row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tile // row_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_is_there, w_is_there = rows < tokens, columns < outputs
    x_rows, w_rows = rows.to(tl.int64) * inputs, columns.to(tl.int64) * inputs
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    one, two, four = total, total, total
    for leaf in tl.static_range(0, LEAVES):
        first = (part * LEAVES + leaf) * leaf_size
        acc = _leaf_sum(
            x_ptr, weight_ptr, first, leaf_size, x_rows, w_rows, x_is_there, w_is_there, BLOCK_M, BLOCK_N, BLOCK_K
        )
        if HAS_BIAS and leaf == 0:
            # Only the first leaf of all has it.
            bias = tl.load(bias_ptr + columns, mask=w_is_there, other=0.0).to(tl.float32)
            acc = tl.where(part == 0, acc + bias[None, :], acc)
        total, one, two, four = add_leaf(leaf, acc, one, two, four)
    out = out_ptr + (part * tokens + rows.to(tl.int64))[:, None] * outputs + columns[None, :]
    tl.store(out, rounded(total, out_ptr.dtype.element_ty), mask=x_is_there[:, None] & w_is_there[None, :])


_MOST_AT_ONCE = 4
"""Leaves that a program computes: the sums that wait for one another must fit its registers."""
_ALIGNED = 16
"""Inputs of which a leaf is a multiple where it can be read in whole vectors."""


def _unit(leaf_size: int) -> int:
    return 1 if leaf_size % _ALIGNED else _ALIGNED


def fixed_linear_config(dtype: torch.dtype, *, is_tree: bool, unit: int = _ALIGNED) -> KernelConfig:
    """Return the one configuration for a type, of sums that are trees or of others, of aligned leaves or not. Nothing
    else decides, and these are the same on all ranks.

    A tree keeps up to three sums of a tile at once, so its tiles are smaller.
    """
    if unit == 1 and dtype != torch.float32:
        return KernelConfig(tiles={"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=4, num_stages=1)
    if dtype == torch.float32:
        # No tensor cores: float32 is multiplied as it is.
        tiles = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 16}
        return KernelConfig(tiles=tiles, num_warps=4, num_stages=3)
    tiles = {"BLOCK_M": 64, "BLOCK_N": 64 if is_tree else 128, "BLOCK_K": 64}
    return KernelConfig(tiles=tiles, num_warps=4, num_stages=3)


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``fixed_linear`` launches: of several numbers of leaves the most, which takes most."""
    for dtype in DTYPES:
        # (leaves of a launch, whether it is part of a tree, type of the result, how leaves are aligned)
        most = 1 if dtype == torch.float32 else _MOST_AT_ONCE
        ways = [(1, False, dtype, _ALIGNED), (most, True, torch.float32, _ALIGNED), (1, True, torch.float32, 1)]
        for leaves, is_tree, out, unit in ways[1 if dtype == torch.float32 else 0 :]:
            kind, to = pointer(dtype), pointer(out)
            yield CompileCase(
                kernel=_fixed_linear_kernel,
                name=f"{kind[1:]} to {to[1:]} {'tree of ' if is_tree else ''}{leaves}{' odd' if unit == 1 else ''}",
                config=fixed_linear_config(dtype, is_tree=is_tree, unit=unit),
                signature={
                    **dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr"), kind),
                    "out_ptr": to,
                    **dict.fromkeys(("tokens", "outputs", "leaves", "leaf_units"), "i32"),
                },
                constants={"UNIT": unit, "HAS_BIAS": True, "LEAVES": leaves},
            )


def fixed_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    leaves: int = 0,
    dtype: torch.dtype | None = None,
    split: bool | None = None,
) -> Tensor:
    """As ``fixed_linear_reference``, of x's type or ``dtype``; a row's bits do not depend on the other rows.

    ``leaves``: 1, 2, 4 or 8 chunks of a tree; 0 for a sum that is none, which may have other bits than a tree of one.
    ``split``: whether each chunk is a program's own; None decides by how many tiles there are. It changes no bits.

    Shapes: x_TI [tokens, inputs]; weight_OI [outputs, inputs]; bias_O [outputs]; all of one float type
    Raises: ValueError naming the tensor, or ``leaves``
    """
    _check(x_TI, weight_OI, bias_O, max(leaves, 1))
    dtype = dtype or x_TI.dtype
    if not uses_triton("linear_fixed", x_TI):
        return fixed_linear_reference(x_TI, weight_OI, bias_O, leaves=max(leaves, 1), dtype=dtype)
    x_TI, weight_OI = x_TI.contiguous(), weight_OI.contiguous()
    tokens, outputs = x_TI.shape[0], weight_OI.shape[0]
    unit = _unit(x_TI.shape[1] // max(leaves, 1))
    config = fixed_linear_config(x_TI.dtype, is_tree=leaves > 0, unit=unit)
    tiles = -(-tokens // config.tiles["BLOCK_M"]) * -(-outputs // config.tiles["BLOCK_N"])
    if split is None:
        split = tiles < 2 * processors(x_TI.device)
    at_once = max(leaves, 1) if not split and _takes_several(x_TI.dtype, unit) else 1
    at_once = min(at_once, _MOST_AT_ONCE)
    # Parts of trees are float32, and so are odd sums, of which there is one kernel.
    is_last = not leaves and unit != 1
    parts_NTO = torch.empty(
        (max(leaves, 1) // at_once, tokens, outputs),
        dtype=x_TI.dtype if is_last else torch.float32,
        device=x_TI.device,
    )
    _multiply(x_TI, weight_OI, bias_O, parts_NTO, config, tiles=tiles, leaves=at_once)
    return parts_NTO[0].to(dtype) if is_last else add_stacked(parts_NTO, dtype)


def _takes_several(dtype: torch.dtype, unit: int) -> bool:
    """Return whether a program computes several leaves where there are tiles enough."""
    return unit != 1 and dtype != torch.float32


def _multiply(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    out_NTO: Tensor,
    config: KernelConfig,
    *,
    tiles: int,
    leaves: int,
) -> None:
    """Launch the kernel for N parts of ``leaves`` leaves each. Shapes: out_NTO [parts, tokens, outputs]"""
    parts = out_NTO.shape[0]
    leaf_size = x_TI.shape[1] // (parts * leaves)
    unit = _unit(leaf_size)
    launch(
        _fixed_linear_kernel,
        (tiles, parts),
        config,
        x_ptr=x_TI,
        weight_ptr=weight_OI,
        bias_ptr=weight_OI if bias_O is None else bias_O,
        out_ptr=out_NTO,
        tokens=x_TI.shape[0],
        outputs=weight_OI.shape[0],
        leaves=parts * leaves,
        leaf_units=leaf_size // unit,
        UNIT=unit,
        HAS_BIAS=bias_O is not None,
        LEAVES=leaves,
    )


def _check(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, leaves: int) -> None:
    if x_TI.dtype not in DTYPES or weight_OI.dtype != x_TI.dtype:
        raise ValueError(f"weight: {weight_OI.dtype} and x {x_TI.dtype} must be one of float32, bfloat16 and float16")
    if x_TI.dim() != 2 or weight_OI.dim() != 2 or weight_OI.shape[1] != x_TI.shape[1]:
        raise ValueError(f"weight: {list(weight_OI.shape)} does not fit x {list(x_TI.shape)}")
    if leaves not in (1, 2, 4, LEAVES) or weight_OI.shape[1] % leaves:
        raise ValueError(f"leaves: {leaves} do not cut {weight_OI.shape[1]} inputs into equal chunks of a tree")
    if bias_O is not None and (bias_O.shape != weight_OI.shape[:1] or bias_O.dtype != x_TI.dtype):
        raise ValueError(f"bias: {list(bias_O.shape)} {bias_O.dtype} does not fit {weight_OI.shape[0]} outputs")
