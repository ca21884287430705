"""KV gathered for a transfer, and scattered where it arrives: blocks of all layers, a range of heads, another type.

Shapes: a layer's cache is [2, num_blocks, KV heads, block size, head size]; L layers, B blocks, P heads that are moved;
packed KV is [L, 2, B, P, block size, head size], contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backends import uses_triton
from .compile_case import CompileCase, pointer, targets_for
from .launch import KernelConfig, jit, launch, tl
from .pointer_table import memory_at, pointer_table
from .tiles import rounded

_CONFIG = KernelConfig(tiles={"BLOCK": 2048}, num_warps=4, num_stages=1)
_CONFIG_OF_BYTES = KernelConfig(tiles={"BLOCK": 1024}, num_warps=4, num_stages=1)
_ALIGNED = ("row_stride", "row_start", "size")
_FLOAT8 = torch.float8_e4m3fn
_TYPES: Mapping[torch.dtype, Any] = {torch.bfloat16: tl.bfloat16, _FLOAT8: tl.float8e4nv}
_CONVERSIONS = ((torch.bfloat16, _FLOAT8), (_FLOAT8, torch.bfloat16))
"""What the kernel makes of what; other types are converted by torch."""


def pack_kv_reference(
    layer_caches: Sequence[Tensor],
    blocks_B: Tensor,
    heads: range,
    dtype: torch.dtype,
    *,
    k_factor: float = 1.0,
    v_factor: float = 1.0,
) -> Tensor:
    """Return some heads of some blocks of all layers, in one piece; numbers are multiplied by a factor on their way.

    Shapes: layer_caches: each [2, blocks, KV heads, block size, head size]; blocks_B [blocks] int64; returns [layers,
    2, blocks, heads, block size, head size] of type ``dtype``
    """
    factors = torch.tensor([k_factor, v_factor], device=blocks_B.device).view(2, 1, 1, 1, 1)
    taken = [_as_bytes(layer)[:, blocks_B, heads.start : heads.stop].view(layer.dtype) for layer in layer_caches]
    return torch.stack([_converted(each, dtype, factors) for each in taken])


def unpack_kv_reference_(
    packed: Tensor,
    layer_caches: Sequence[Tensor],
    blocks_B: Tensor,
    heads: range,
    *,
    k_factor: float = 1.0,
    v_factor: float = 1.0,
) -> None:
    """Write packed KV to its heads of some blocks of all layers; numbers are multiplied by a factor on their way.

    Shapes: as of ``pack_kv_reference``; no block stands twice in blocks_B
    """
    factors = torch.tensor([k_factor, v_factor], device=blocks_B.device).view(2, 1, 1, 1, 1)
    for layer_cache, new in zip(layer_caches, packed, strict=True):
        converted = _as_bytes(_converted(new, layer_cache.dtype, factors))
        _as_bytes(layer_cache)[:, blocks_B, heads.start : heads.stop] = converted


def _as_bytes(x: Tensor) -> Tensor:
    # Numbers of eight bits are not moved by every operation.
    return x.view(torch.uint8) if x.element_size() == 1 else x


def _converted(x: Tensor, dtype: torch.dtype, factors: Tensor) -> Tensor:
    if x.dtype == dtype and bool((factors == 1).all()):
        return x
    values = x.float() * factors
    return (values.clamp(-448, 448) if dtype == _FLOAT8 else values).to(dtype)


@jit
def _move_rows_kernel(
    tensors_ptr,
    index_ptr,
    packed_ptr,
    count,
    part_rows,
    row_stride,
    row_start,
    size,
    k_factor,
    v_factor,
    parts,
    GATHERS: tl.constexpr,
    CONVERTS: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program moves ``BLOCK`` numbers of one row, out of one part of a tensor (its keys, its values) or there."""
    row, part = tl.program_id(0), tl.program_id(1)
    memory_ptr = memory_at(tensors_ptr + part // parts, TYPE, ALIGNMENT)
    half = part % parts
    place = half.to(tl.int64) * part_rows + tl.load(index_ptr + row)
    memory_ptr += place * row_stride + row_start
    packed_ptr += (part.to(tl.int64) * count + row) * size
    numbers = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    is_there = numbers < size
    source_ptr = memory_ptr if GATHERS else packed_ptr
    target_ptr = packed_ptr if GATHERS else memory_ptr
    moved = tl.load(source_ptr + numbers, mask=is_there)
    if CONVERTS:
        factor = tl.where(half == 0, k_factor, v_factor)
        moved = rounded(moved.to(tl.float32) * factor, target_ptr.dtype.element_ty)
    tl.store(target_ptr + numbers, moved, mask=is_there)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """What rows are moved as: ``dtype`` in torch, and the constants of the kernel."""

    dtype: torch.dtype
    constants: Mapping[str, Any]
    config: KernelConfig = _CONFIG


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Where rows are in a tensor of ``parts`` parts: row i of a part begins ``row_start`` behind ``i * row_stride``."""

    parts: int
    part_rows: int
    row_stride: int
    row_start: int
    size: int


_WORDS = _Unit(dtype=torch.int64, constants={"TYPE": tl.int64, "ALIGNMENT": 16, "CONVERTS": False})
_BYTES = _Unit(
    dtype=torch.uint8, constants={"TYPE": tl.uint8, "ALIGNMENT": 1, "CONVERTS": False}, config=_CONFIG_OF_BYTES
)


def _converting(dtype: torch.dtype) -> _Unit:
    return _Unit(dtype=dtype, constants={"TYPE": _TYPES[dtype], "ALIGNMENT": 16, "CONVERTS": True})


def _unit_for(tensors: Sequence[Tensor], *bytes_of_rows: int) -> _Unit:
    are_aligned = all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    return _WORDS if are_aligned and all(count % 16 == 0 for count in bytes_of_rows) else _BYTES


def compile_cases() -> Iterator[CompileCase]:
    """Return what moves KV: as it is, and into other types."""
    ints = ("parts", "count", "part_rows", "row_stride", "row_start", "size")
    signature = {
        **dict.fromkeys(("tensors_ptr", "index_ptr"), "*i64"),
        **dict.fromkeys(ints, "i32"),
        **dict.fromkeys(("k_factor", "v_factor"), "fp32"),
    }
    for gathers in (True, False):
        way = "gather" if gathers else "scatter"
        for unit in (_WORDS, _BYTES):
            yield CompileCase(
                kernel=_move_rows_kernel,
                name=f"{way} {unit.dtype}",
                config=unit.config,
                signature={**signature, "packed_ptr": pointer(unit.dtype)},
                aligned=_ALIGNED,
                constants={"GATHERS": gathers, **unit.constants},
            )
        for kept, packed in _CONVERSIONS:
            yield CompileCase(
                kernel=_move_rows_kernel,
                name=f"{way} {pointer(kept)[1:]} as {pointer(packed)[1:]}",
                config=_CONFIG,
                signature={**signature, "packed_ptr": pointer(packed)},
                aligned=_ALIGNED,
                constants={"GATHERS": gathers, **_converting(kept).constants},
                targets=targets_for(kept, packed),
            )


def pack_kv(
    layer_caches: Sequence[Tensor],
    blocks_B: Tensor,
    heads: range,
    dtype: torch.dtype,
    *,
    k_factor: float = 1.0,
    v_factor: float = 1.0,
) -> Tensor:
    """As ``pack_kv_reference``. Raises: ValueError for heads that there are not"""
    _check(layer_caches, heads)
    if not _by_triton(layer_caches, heads, dtype, k_factor, v_factor):
        return pack_kv_reference(layer_caches, blocks_B, heads, dtype, k_factor=k_factor, v_factor=v_factor)
    first = layer_caches[0]
    shape = (len(layer_caches), 2, len(blocks_B), len(heads), *first.shape[3:])
    packed = torch.empty(shape, dtype=dtype, device=first.device)
    _move_blocks(packed, layer_caches, blocks_B, heads, k_factor, v_factor, gathers=True)
    return packed


def unpack_kv_(
    packed: Tensor,
    layer_caches: Sequence[Tensor],
    blocks_B: Tensor,
    heads: range,
    *,
    k_factor: float = 1.0,
    v_factor: float = 1.0,
) -> None:
    """As ``unpack_kv_reference_``. Raises: ValueError for heads that there are not, or packed KV of another shape"""
    _check(layer_caches, heads)
    shape = (len(layer_caches), 2, len(blocks_B), len(heads), *layer_caches[0].shape[3:])
    if packed.shape != shape:
        raise ValueError(f"packed KV of this shape is needed: {shape}, got {tuple(packed.shape)}")
    if not _by_triton(layer_caches, heads, packed.dtype, k_factor, v_factor):
        unpack_kv_reference_(packed, layer_caches, blocks_B, heads, k_factor=k_factor, v_factor=v_factor)
        return
    _move_blocks(packed.contiguous(), layer_caches, blocks_B, heads, k_factor, v_factor, gathers=False)


def gather_rows(rows: Tensor, index: Tensor, out: Tensor) -> None:
    """Copy some rows to ``out``, one after the other.

    Shapes: rows [all, row]; index [some] int64; out [some, row], contiguous, same type
    """
    if _moves_rows(rows, out):
        _move_rows(rows, index, out, gathers=True)
    else:
        torch.index_select(rows, 0, index, out=out)


def scatter_rows(rows: Tensor, index: Tensor, source: Tensor) -> None:
    """Copy what ``gather_rows`` gathered back to its rows. Shapes: as there; no row stands twice in index"""
    if _moves_rows(rows, source):
        _move_rows(rows, index, source, gathers=False)
    else:
        rows.index_copy_(0, index, source)


def _check(layer_caches: Sequence[Tensor], heads: range) -> None:
    kv_heads = layer_caches[0].shape[2]
    if heads.step != 1 or heads.start < 0 or heads.stop > kv_heads:
        raise ValueError(f"heads {heads} are no range of {kv_heads} KV heads")


def _by_triton(
    layer_caches: Sequence[Tensor], heads: range, dtype: torch.dtype, k_factor: float, v_factor: float
) -> bool:
    first = layer_caches[0]
    are_alike = all(each.shape == first.shape and each.dtype == first.dtype for each in layer_caches)
    if not are_alike or not all(x.is_contiguous() for x in layer_caches) or not uses_triton("kv_pack", first):
        return False
    if not _converts(first.dtype, dtype, k_factor, v_factor):
        return True
    head_bytes = first[0, 0, 0].nbytes
    is_aligned = _unit_for(layer_caches, head_bytes * len(heads), head_bytes * heads.start) is _WORDS
    return is_aligned and (first.dtype, dtype) in _CONVERSIONS


def _converts(dtype: torch.dtype, packed: torch.dtype, k_factor: float, v_factor: float) -> bool:
    return dtype != packed or (k_factor, v_factor) != (1.0, 1.0)


def _move_blocks(
    packed: Tensor,
    layer_caches: Sequence[Tensor],
    blocks_B: Tensor,
    heads: range,
    k_factor: float,
    v_factor: float,
    *,
    gathers: bool,
) -> None:
    first = layer_caches[0]
    head_bytes = first[0, 0, 0].nbytes
    bytes_of_rows = (first.shape[2] * head_bytes, len(heads) * head_bytes, heads.start * head_bytes)
    unit = _unit_for((*layer_caches, packed), *bytes_of_rows)
    if _converts(first.dtype, packed.dtype, k_factor, v_factor):
        unit = _converting(first.dtype)
    row_stride, size, row_start = (count // unit.dtype.itemsize for count in bytes_of_rows)
    rows = _Rows(parts=2, part_rows=first.shape[1], row_stride=row_stride, row_start=row_start, size=size)
    flat = packed if unit.constants["CONVERTS"] else packed.view(-1).view(unit.dtype)
    _launch(flat, layer_caches, blocks_B, unit, rows, factors=(k_factor, v_factor), gathers=gathers)


def _moves_rows(rows: Tensor, packed: Tensor) -> bool:
    are_alike = rows.dtype == packed.dtype and rows.is_contiguous() and packed.is_contiguous()
    return are_alike and uses_triton("kv_pack", rows)


def _move_rows(rows: Tensor, index: Tensor, packed: Tensor, *, gathers: bool) -> None:
    row_bytes = rows.shape[1] * rows.element_size()
    unit = _unit_for((rows, packed), row_bytes)
    row = row_bytes // unit.dtype.itemsize
    places = _Rows(parts=1, part_rows=0, row_stride=row, row_start=0, size=row)
    _launch(packed.view(-1).view(unit.dtype), (rows,), index, unit, places, factors=(1.0, 1.0), gathers=gathers)


def _launch(
    packed: Tensor,
    tensors: Sequence[Tensor],
    index: Tensor,
    unit: _Unit,
    rows: _Rows,
    *,
    factors: tuple[float, float],
    gathers: bool,
) -> None:
    launch(
        _move_rows_kernel,
        (len(index), rows.parts * len(tensors), -(-rows.size // unit.config.tiles["BLOCK"])),
        unit.config,
        tensors_ptr=pointer_table(tensors),
        index_ptr=index.contiguous(),
        packed_ptr=packed,
        count=len(index),
        part_rows=rows.part_rows,
        row_stride=rows.row_stride,
        row_start=rows.row_start,
        size=rows.size,
        k_factor=factors[0],
        v_factor=factors[1],
        parts=rows.parts,
        GATHERS=gathers,
        **unit.constants,
    )
