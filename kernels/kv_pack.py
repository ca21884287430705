"""Rows of a KV cache gathered for a transfer, and scattered where it arrives; on their way they may change their type.

What is moved, the rows' index says: tokens, blocks, a range of heads, keys and values are all runs of a layer's memory
(``comm/kv/runs.py``), and rows are what such runs consist of. Numbers of 8 bits take half the bytes on the wire.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import uses_triton
from .compile_case import CompileCase, pointer, targets_for
from .launch import KernelConfig, jit, launch, tl
from .tiles import rounded

_CONFIG = KernelConfig(tiles={"BLOCK": 2048}, num_warps=4, num_stages=1)
_CONFIG_OF_BYTES = KernelConfig(tiles={"BLOCK": 1024}, num_warps=4, num_stages=1)
_FLOAT8 = torch.float8_e4m3fn
_FLOAT8_CAPABILITY = (8, 9)
_LARGEST = 448.0
_CONVERSIONS = ((torch.bfloat16, _FLOAT8), (_FLOAT8, torch.bfloat16))
"""What the kernel makes of what; other types are converted by torch."""


def gather_rows_reference(rows: Tensor, index: Tensor, out: Tensor) -> None:
    """Copy some rows to ``out``, one after the other, as numbers of its type: the nearest ones, float8 cut off at 448.

    Shapes: rows [all, row]; index [some] int64; out [some, row]
    """
    if rows.dtype == out.dtype:
        torch.index_select(_as_bytes(rows), 0, index, out=_as_bytes(out))
    else:
        out.copy_(_converted(_as_bytes(rows)[index].view(rows.dtype), out.dtype))


def scatter_rows_reference_(rows: Tensor, index: Tensor, source: Tensor) -> None:
    """Copy what was gathered to its rows, as numbers of their type. Shapes: as there; no row stands twice in index"""
    _as_bytes(rows).index_copy_(0, index, _as_bytes(_converted(source, rows.dtype)))


def _as_bytes(x: Tensor) -> Tensor:
    # Numbers of eight bits are not moved by every operation.
    return x.view(torch.uint8) if x.element_size() == 1 else x


def _converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype == dtype:
        return x
    return (x.clamp(-_LARGEST, _LARGEST) if dtype == _FLOAT8 else x).to(dtype)


@jit
def _move_rows_kernel(
    rows_ptr, index_ptr, packed_ptr, size, GATHERS: tl.constexpr, CONVERTS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program moves ``BLOCK`` numbers of one row, out of the cache or into it."""
    at = tl.program_id(0)
    numbers = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = numbers < size
    rows_ptr += tl.load(index_ptr + at) * size
    packed_ptr += at.to(tl.int64) * size
    source_ptr = rows_ptr if GATHERS else packed_ptr
    target_ptr = packed_ptr if GATHERS else rows_ptr
    moved = tl.load(source_ptr + numbers, mask=is_there)
    if CONVERTS:
        moved = rounded(moved.to(tl.float32), target_ptr.dtype.element_ty)
    tl.store(target_ptr + numbers, moved, mask=is_there)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """What rows are moved as."""

    dtype: torch.dtype
    config: KernelConfig
    aligned: tuple[str, ...] = ()


_WORDS = _Unit(dtype=torch.int64, config=_CONFIG, aligned=("size",))
_BYTES = _Unit(dtype=torch.uint8, config=_CONFIG_OF_BYTES)


def compile_cases() -> Iterator[CompileCase]:
    """Return what moves rows: as they are, and into other types."""
    for gathers in (True, False):
        way = "gather" if gathers else "scatter"
        for unit in (_WORDS, _BYTES):
            yield CompileCase(
                kernel=_move_rows_kernel,
                name=f"{way} {unit.dtype}",
                config=unit.config,
                signature=_signature(unit.dtype, unit.dtype),
                aligned=unit.aligned,
                constants={"GATHERS": gathers, "CONVERTS": False},
            )
        for kept, packed in _CONVERSIONS:
            yield CompileCase(
                kernel=_move_rows_kernel,
                name=f"{way} {pointer(kept)[1:]} as {pointer(packed)[1:]}",
                config=_CONFIG,
                signature=_signature(kept, packed),
                aligned=("size",),
                constants={"GATHERS": gathers, "CONVERTS": True},
                targets=targets_for(kept, packed),
            )


def _signature(kept: torch.dtype, packed: torch.dtype) -> Mapping[str, str]:
    return {"rows_ptr": pointer(kept), "index_ptr": "*i64", "packed_ptr": pointer(packed), "size": "i32"}


def gather_rows(rows: Tensor, index: Tensor, out: Tensor) -> None:
    """As ``gather_rows_reference``. Shapes: as there; out contiguous"""
    if _by_kernel(rows, out):
        _move_rows(rows, index, out, gathers=True)
    else:
        gather_rows_reference(rows, index, out)


def scatter_rows(rows: Tensor, index: Tensor, source: Tensor) -> None:
    """As ``scatter_rows_reference_``. Shapes: as there; source contiguous"""
    if _by_kernel(rows, source):
        _move_rows(rows, index, source, gathers=False)
    else:
        scatter_rows_reference_(rows, index, source)


def _by_kernel(rows: Tensor, packed: Tensor) -> bool:
    if not rows.is_contiguous() or not packed.is_contiguous() or not uses_triton("kv_pack", rows):
        return False
    return rows.dtype == packed.dtype or ((rows.dtype, packed.dtype) in _CONVERSIONS and _has_float8(rows.device))


def _has_float8(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= _FLOAT8_CAPABILITY


def _move_rows(rows: Tensor, index: Tensor, packed: Tensor, *, gathers: bool) -> None:
    kept, config = rows, _CONFIG
    converts = rows.dtype != packed.dtype
    if not converts:
        unit = _unit_for(rows, packed)
        kept, packed, config = rows.view(-1).view(unit.dtype), packed.view(-1).view(unit.dtype), unit.config
    size = rows.shape[1] * rows.element_size() // kept.element_size()
    launch(
        _move_rows_kernel,
        (len(index), -(-size // config.tiles["BLOCK"])),
        config,
        rows_ptr=kept,
        index_ptr=index.contiguous(),
        packed_ptr=packed,
        size=size,
        GATHERS=gathers,
        CONVERTS=converts,
    )


def _unit_for(rows: Tensor, packed: Tensor) -> _Unit:
    are_words = rows.shape[1] * rows.element_size() % 16 == 0
    return _WORDS if are_words and all(x.data_ptr() % 16 == 0 for x in (rows, packed)) else _BYTES
