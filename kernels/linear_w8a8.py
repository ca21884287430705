"""The matrix product of 8-bit numbers, integers or float8, on GPUs: weights by output, activations by row.

The scales belong to whole rows and whole outputs, so they are multiplied with once, when a sum is complete. Sums of
integers are exact: whatever tiles and splits, the same bits. Sums of float8 are in float32, and a row's depend on how
many rows there are unless one way is taken for all (``one_way``).

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from .backends import uses_triton
from .compile_case import CompileCase, pointer, targets_for
from .launch import INTERPRETED, KernelConfig, jit, launch, tl
from .quantize_rows import quantize_rows
from .split_sums import empty_outputs, split_count, split_sums_
from .tiles import rounded

BYTE_TYPES = (torch.int8, torch.float8_e4m3fn)
_UNIT = 128
"""Weights are filled up to multiples of it, so that nothing is masked where they are read."""
_ALIGNED = 16
_MOST_SPLIT_ROWS = 64
_ROWS_AT_ONCE = 512
_INTERPRETED = tl.constexpr(INTERPRETED)
_UNITS = tl.constexpr(_UNIT)


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteMatrix:
    """A weight of 8-bit numbers: input i of output o is ``values_OI[o, i] * scales_O[o]``.

    Shapes: values_OI [outputs, inputs], both filled up with zeros, int8 or float8_e4m3fn; scales_O [outputs filled up]
    float32
    """

    values_OI: Tensor
    scales_O: Tensor
    outputs: int
    inputs: int

    def weight(self) -> Tensor:
        """Return what the numbers stand for.

        Shapes: returns [outputs, inputs] float32
        """
        values_OI = self.values_OI[: self.outputs, : self.inputs]
        return values_OI.float() * self.scales_O[: self.outputs].unsqueeze(1)


def pack_byte_matrix(values_OI: Tensor, scales_O: Tensor) -> ByteMatrix:
    """Lay quantized numbers out for the kernel.

    Shapes: values_OI [outputs, inputs] int8 or float8_e4m3fn; scales_O [outputs] float32
    """
    outputs, inputs = values_OI.shape
    filled_up = torch.zeros(
        (outputs + -outputs % _UNIT, inputs + -inputs % _UNIT), dtype=values_OI.dtype, device=values_OI.device
    )
    filled_up[:outputs, :inputs] = values_OI
    scales_O = functional.pad(scales_O.float(), (0, -outputs % _UNIT))
    return ByteMatrix(values_OI=filled_up, scales_O=scales_O, outputs=outputs, inputs=inputs)


def quantize_matrix(weight_OI: Tensor, dtype: torch.dtype) -> ByteMatrix:
    """Quantize a weight, each output with a scale of its own.

    Shapes: weight_OI [outputs, inputs] any float type
    Source: symmetric per-channel quantization (arXiv 2004.09602, sections 3.2 and 4.1)
    """
    values_OI, scales_O1 = quantize_rows(weight_OI, dtype)
    return pack_byte_matrix(values_OI, scales_O1.view(-1))


def linear_w8a8_reference(
    rows_TI: Tensor, scales_T1: Tensor, matrix: ByteMatrix, bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return ``(rows @ values.T) * scales * matrix.scales + bias``, summed in float64, in which integers are exact.

    Shapes: rows_TI [tokens, inputs] of the matrix' type; scales_T1 [tokens, 1] float32; bias_O [outputs]; returns
    [tokens, outputs] of ``dtype``
    Source: dynamic quantization by token (ZeroQuant, arXiv 2206.01861, section 3.1)
    """
    values_OI = matrix.values_OI[: matrix.outputs, : matrix.inputs]
    sums_TO = (rows_TI.float().double() @ values_OI.float().double().t()).float()
    sums_TO = sums_TO * scales_T1 * matrix.scales_O[: matrix.outputs]
    return (sums_TO if bias_O is None else sums_TO + bias_O.float()).to(dtype)


@jit
def _add_product(a, b, acc):
    """Return ``acc + a @ b``; float8 sums leave the tensor cores, which keep few of their bits, after each tile."""
    if tl.int32 == acc.dtype:
        return tl.dot(a, b, acc, out_dtype=tl.int32)
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, max_num_imprecise_acc=a.shape[1])


@jit
def _w8a8_kernel(
    x_ptr,
    weight_ptr,
    x_scales_ptr,
    weight_scales_ptr,
    bias_ptr,
    out_ptr,
    rows,
    outputs_16,
    inputs_16,
    weight_units,
    steps_each,
    x_stride_16,
    biases,
    SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program multiplies a tile of rows and outputs over one split of the inputs.

    With several splits (``SUMS``) ``out_ptr`` is [splits, rows, outputs], of what is summed in, without scales and
    bias. ``biases``: how many there are, all or none. Units say what strides are multiples of: only then are loads
    known to be aligned.
    """
    SUM_TYPE: tl.constexpr = tl.int32 if tl.int8 == x_ptr.dtype.element_ty else tl.float32
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    outputs, weight_stride = outputs_16 * 16, weight_units * _UNITS
    first = tl.program_id(2) * steps_each
    # Rows that are not there are read as the last one, and not written.
    row = tl.minimum(m, rows - 1).to(tl.int64)
    x_at = x_ptr + row[:, None] * (x_stride_16 * 16) + first * BLOCK_K + k[None, :]
    weight_at = weight_ptr + n[None, :].to(tl.int64) * weight_stride + first * BLOCK_K + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), SUM_TYPE)
    for step in range(first, tl.minimum(first + steps_each, weight_stride // BLOCK_K)):
        x = tl.load(x_at, mask=k[None, :] < inputs_16 * 16 - step * BLOCK_K, other=0.0)
        acc = _add_product(x, tl.load(weight_at), acc)
        x_at += BLOCK_K
        weight_at += BLOCK_K
    place = (tl.program_id(2).to(tl.int64) * rows + m) * outputs
    is_there = (m < rows)[:, None] & (n < outputs)[None, :]
    if SUMS:
        tl.store(out_ptr + place[:, None] + n[None, :], acc, mask=is_there)
    else:
        scale = tl.load(x_scales_ptr + row)[:, None]
        result = acc.to(tl.float32) * scale * tl.load(weight_scales_ptr + n)[None, :]
        result += tl.load(bias_ptr + n, mask=n < biases, other=0.0).to(tl.float32)[None, :]
        tl.store(out_ptr + place[:, None] + n[None, :], rounded(result, out_ptr.dtype.element_ty), mask=is_there)


W8A8_CONFIGS: Sequence[KernelConfig] = (
    KernelConfig(tiles={"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128}, num_warps=4, num_stages=4),
    KernelConfig(tiles={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128}, num_warps=4, num_stages=4),
    KernelConfig(tiles={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128}, num_warps=8, num_stages=3),
)
"""For 1 to 16 rows, up to 64, and more. Products of any number of rows in one way take the second."""


def w8a8_config(rows: int, *, one_way: bool = False) -> KernelConfig:
    """Return how so many rows are multiplied."""
    if one_way:
        return W8A8_CONFIGS[1]
    return W8A8_CONFIGS[0 if rows <= 16 else 1 if rows <= 64 else 2]


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``linear_w8a8`` launches: the last configuration is never split."""
    for kind in BYTE_TYPES:
        sums = torch.int32 if kind == torch.int8 else torch.float32
        for config in W8A8_CONFIGS:
            outs = [(dtype, False) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
            for dtype, is_split in [*outs, *([(sums, True)] if config is not W8A8_CONFIGS[-1] else [])]:
                yield CompileCase(
                    kernel=_w8a8_kernel,
                    name=f"{pointer(kind)[1:]} {'sums' if is_split else 'to ' + pointer(dtype)[1:]}",
                    config=config,
                    signature={
                        **dict.fromkeys(("x_ptr", "weight_ptr"), pointer(kind)),
                        **dict.fromkeys(("x_scales_ptr", "weight_scales_ptr"), "*fp32"),
                        **dict.fromkeys(("bias_ptr", "out_ptr"), pointer(dtype)),
                        **dict.fromkeys(("rows", "outputs_16", "inputs_16", "weight_units", "steps_each"), "i32"),
                        **dict.fromkeys(("x_stride_16", "biases"), "i32"),
                    },
                    constants={"SUMS": is_split},
                    targets=targets_for(kind),
                )


def linear_w8a8(
    x_TI: Tensor, matrix: ByteMatrix, bias_O: Tensor | None = None, *, one_way: bool = False, wide: bool = False
) -> Tensor:
    """Return ``x @ weight.T + bias``, x quantized row by row to the matrix' type.

    The result is of x's type, or float32 if ``wide``.

    Shapes: x_TI [tokens, inputs] any float type; bias_O [outputs]; returns [tokens, outputs]
    """
    rows_TI, scales_T1 = quantize_rows(x_TI, matrix.values_OI.dtype)
    dtype = torch.float32 if wide else x_TI.dtype
    return linear_w8a8_rows(rows_TI, scales_T1, matrix, bias_O, dtype=dtype, one_way=one_way)


def linear_w8a8_rows(
    rows_TI: Tensor,
    scales_T1: Tensor,
    matrix: ByteMatrix,
    bias_O: Tensor | None = None,
    *,
    dtype: torch.dtype,
    one_way: bool = False,
) -> Tensor:
    """As ``linear_w8a8_reference``, for rows that were quantized before.

    ``one_way``: the same arithmetic for any number of rows, so that a row's bits never depend on how many there are

    Raises: ValueError when the rows have other inputs than the matrix, or are of another type
    """
    if rows_TI.dim() != 2 or rows_TI.shape[1] != matrix.inputs or rows_TI.dtype != matrix.values_OI.dtype:
        wanted = f"[tokens, {matrix.inputs}] {matrix.values_OI.dtype}"
        raise ValueError(f"rows_TI: {wanted} is multiplied here, got {list(rows_TI.shape)} {rows_TI.dtype}")
    if not uses_triton("linear_w8a8", rows_TI):
        return linear_w8a8_reference(rows_TI, scales_T1, matrix, bias_O, dtype)
    if matrix.inputs % _ALIGNED:
        rows_TI = _filled_up(rows_TI)
    elif rows_TI.stride(1) != 1 or rows_TI.stride(0) % _ALIGNED:
        rows_TI = rows_TI.contiguous()
    scales_T1 = scales_T1.contiguous()
    if bias_O is not None:
        bias_O = bias_O.to(dtype).contiguous()
    out_TO = empty_outputs(rows_TI, matrix.outputs, dtype)
    config = w8a8_config(rows_TI.shape[0], one_way=one_way)
    is_split = one_way or rows_TI.shape[0] <= _MOST_SPLIT_ROWS
    tiles = matrix.values_OI.shape[0] // config.tiles["BLOCK_N"]
    steps = matrix.values_OI.shape[1] // config.tiles["BLOCK_K"]
    splits = split_count(tiles, steps, one_way=one_way) if is_split else 1
    if splits == 1:
        _multiply(rows_TI, scales_T1, matrix, bias_O, out_TO.unsqueeze(0), config)
        return out_TO[:, : matrix.outputs].contiguous()
    sums = torch.int32 if rows_TI.dtype == torch.int8 else torch.float32
    for first in range(0, rows_TI.shape[0], _ROWS_AT_ONCE):
        some = slice(first, first + _ROWS_AT_ONCE)
        parts_STO = torch.empty(splits, *out_TO[some].shape, dtype=sums, device=rows_TI.device)
        _multiply(rows_TI[some], scales_T1[some], matrix, None, parts_STO, config)
        split_sums_(
            out_TO[some], parts_STO, row_scales_T1=scales_T1[some], output_scales_O=matrix.scales_O, bias_O=bias_O
        )
    return out_TO[:, : matrix.outputs].contiguous()


def _filled_up(rows_TI: Tensor) -> Tensor:
    """Return rows that begin at multiples of 16 bytes; float8 has no padding of its own."""
    filled_up = functional.pad(rows_TI.view(torch.int8), (0, -rows_TI.shape[1] % _ALIGNED))
    return filled_up.view(rows_TI.dtype)


def _multiply(
    rows_TI: Tensor,
    scales_T1: Tensor,
    matrix: ByteMatrix,
    bias_O: Tensor | None,
    parts_STO: Tensor,
    config: KernelConfig,
) -> None:
    """Multiply into ``parts_STO`` [splits, rows, outputs], these filled up to a multiple of 16."""
    splits, rows, outputs = parts_STO.shape
    filled_up, weight_stride = matrix.values_OI.shape
    launch(
        _w8a8_kernel,
        (filled_up // config.tiles["BLOCK_N"], -(-rows // config.tiles["BLOCK_M"]), splits),
        config,
        x_ptr=rows_TI,
        weight_ptr=matrix.values_OI,
        x_scales_ptr=scales_T1,
        weight_scales_ptr=matrix.scales_O,
        bias_ptr=parts_STO if bias_O is None else bias_O,
        out_ptr=parts_STO,
        rows=rows,
        outputs_16=outputs // 16,
        inputs_16=rows_TI.shape[1] // _ALIGNED,
        weight_units=weight_stride // _UNIT,
        steps_each=-(-weight_stride // config.tiles["BLOCK_K"] // splits),
        x_stride_16=rows_TI.stride(0) // _ALIGNED,
        biases=0 if bias_O is None else matrix.outputs,
        SUMS=splits > 1,
    )
