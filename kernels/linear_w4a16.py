"""The matrix product with 4-bit weights and 16-bit activations, on GPUs.

With few rows a product waits for its weights, so they are laid out to be read in one stream and to be unpacked in
registers, in few instructions: a word has numbers of eight *planes*, each 32 inputs long, so that shifting and masking
a tile of words gives two planes at a time, in the layout that tensor cores take. Weights are the products' left side:
tensor cores then have as many columns as there are rows, rounded up to 16. With many rows a product waits for tensor
cores, and what counts is how many rows each unpacked weight serves: tiles are larger, and weights scaled before.

Shapes: T tokens, I inputs, O outputs, S spans of inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from .backends import uses_triton
from .compile_case import ALL_TARGETS, CompileCase, pointer
from .int4_codes import GROUPS, Int4Codes, in_kernel_groups
from .launch import INTERPRETED, KernelConfig, jit, next_power_of_2, tl
from .split_sums import empty_outputs, split_count, split_sums_
from .tiles import dot, rounded
from .tuning import launch_tuned

SPAN = 256
"""Inputs that a row of 32 words has: eight planes of 32."""
_PLANES, _PLANE = 8, 32
_OUTPUT_UNIT = 128
"""Outputs are filled up to a multiple of the largest tile's, so that nothing is masked where weights are read."""
_ALIGNED = 8
"""Rows of activations begin at a multiple of so many numbers: 16 bytes."""
_ROWS_AT_ONCE = 512
"""Rows of which the splits' sums are in memory at a time."""
_INTERPRETED = tl.constexpr(INTERPRETED)
_PLANE_SIZE = tl.constexpr(_PLANE)
_SPAN_SIZE = tl.constexpr(SPAN)
_OUTPUTS = tl.constexpr(_OUTPUT_UNIT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Matrix:
    """A weight of ``Int4Codes`` as the kernel reads it.

    Nibble p of word w of span s is input ``256 s + 32 p + w``. A word of ``meta`` is a group's scale, a float32 whose
    last 8 bits are the zero point instead (scales of 16 bits stay exact). What was filled up has the scale 0.

    Shapes: words_SOW [spans, outputs filled up, 32] int32; meta_GO [groups filled up, outputs filled up] int32; order_I
    [inputs] int64: the layer's input at each place
    """

    words_SOW: Tensor
    meta_GO: Tensor
    outputs: int
    inputs: int
    group: int
    order_I: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return self.words_SOW.nbytes + self.meta_GO.nbytes


def pack_int4_matrix(codes: Int4Codes) -> Int4Matrix:
    """Lay a weight out for the kernel.

    Raises: ValueError when the kernel does not take its groups
    """
    codes = in_kernel_groups(codes)
    (outputs, inputs), group = codes.codes_OI.shape, codes.group
    more_outputs, more_inputs = -outputs % _OUTPUT_UNIT, -inputs % SPAN
    codes_OI = functional.pad(codes.codes_OI, (0, more_inputs, 0, more_outputs))
    planes_OSPW = codes_OI.view(outputs + more_outputs, -1, _PLANES, _PLANE)
    words_OSW = torch.zeros_like(planes_OSPW[:, :, 0], dtype=torch.int32)
    for plane in range(_PLANES):
        words_OSW |= planes_OSPW[:, :, plane].to(torch.int32) << (4 * plane)
    meta_OG = ((codes.scales_OG.view(torch.int32) + 128) & -256) | codes.zeros_OG.to(torch.int32)
    return Int4Matrix(
        words_SOW=words_OSW.transpose(0, 1).contiguous(),
        meta_GO=functional.pad(meta_OG, (0, more_inputs // group, 0, more_outputs)).t().contiguous(),
        outputs=outputs,
        inputs=inputs,
        group=group,
        order_I=codes.order_I,
    )


def unpack_int4_matrix(matrix: Int4Matrix) -> Int4Codes:
    """Return the integers of a matrix; scales as the kernel has them."""
    spans, filled_up, _ = matrix.words_SOW.shape
    planes_PSOW = torch.stack([(matrix.words_SOW >> (4 * plane)) & 15 for plane in range(_PLANES)])
    codes_OI = planes_PSOW.permute(2, 1, 0, 3).reshape(filled_up, spans * SPAN)[: matrix.outputs, : matrix.inputs]
    meta_OG = matrix.meta_GO.t()[: matrix.outputs, : matrix.inputs // matrix.group].contiguous()
    return Int4Codes(
        codes_OI=codes_OI.to(torch.uint8).contiguous(),
        scales_OG=(meta_OG & -256).view(torch.float32),
        zeros_OG=(meta_OG & 255).to(torch.uint8),
        order_I=matrix.order_I,
    )


def linear_w4a16_reference(
    x_TI: Tensor, matrix: Int4Matrix, bias_O: Tensor | None = None, *, wide: bool = False
) -> Tensor:
    """Return ``x @ weight.T + bias``, the weight being what its integers stand for; summed in float32.

    Shapes: x_TI [tokens, inputs] any float type; bias_O [outputs]; returns [tokens, outputs] of x's type, or float32 if
    ``wide``
    Source: weights of 4 bits, activations of 16 (AWQ, arXiv 2306.00978, section 2)
    """
    bias = None if bias_O is None else bias_O.float()
    product_TO = functional.linear(x_TI.float(), unpack_int4_matrix(matrix).weight(), bias)
    return product_TO if wide else product_TO.to(x_TI.dtype)


@jit
def _plane(words, PLANE: tl.constexpr, MAGIC: tl.constexpr):
    """Return a plane of a tile of words as bits of 16-bit floats: its numbers added to 128 (bfloat16) or 1024.

    Numbers of 4 bits are the last ones of such a float's mantissa. The same instructions make planes p and p + 4.
    """
    pairs = ((words >> (4 * (PLANE % 4))) & 0x000F000F) | MAGIC
    if PLANE >= 4:
        pairs = pairs >> 16
    return pairs.to(tl.int16)


@jit
def _difference(bits, zero_bits, TYPE: tl.constexpr):
    """Return small integers' difference, which is exact in any float type: the interpreter has no bfloat16."""
    number, zero = bits.to(TYPE, bitcast=True), zero_bits.to(TYPE, bitcast=True)
    if _INTERPRETED:
        return (number.to(tl.float32) - zero.to(tl.float32)).to(TYPE)
    return number - zero


@jit
def _w4a16_kernel(
    x_ptr,
    words_ptr,
    meta_ptr,
    bias_ptr,
    out_ptr,
    rows,
    outputs_16,
    output_units,
    spans,
    spans_each,
    x_stride_8,
    biases,
    GROUP: tl.constexpr,
    SCALES_WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program multiplies a tile of rows and outputs over one split of the spans.

    Every group is summed by itself, and then scaled; with ``SCALES_WEIGHTS`` weights are scaled, and rounded to x's
    type, before they are multiplied, which takes registers for one sum instead of two.

    With several splits ``out_ptr`` is float32, [splits, rows, outputs], and there is no bias. ``biases``: how many
    there are, all or none. Units say what sizes are multiples of: only then are loads known to be aligned.
    """
    outputs, filled_up = outputs_16 * 16, output_units * _OUTPUTS
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    MAGIC: tl.constexpr = 0x43004300 if tl.bfloat16 == TYPE else 0x64006400
    GROUPS_: tl.constexpr = _SPAN_SIZE // GROUP
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, _PLANE_SIZE)
    first = tl.program_id(2) * spans_each
    words_at = words_ptr + (first.to(tl.int64) * filled_up + n[:, None]) * _PLANE_SIZE + k[None, :]
    meta_at = meta_ptr + first * GROUPS_ * filled_up + n
    # Rows that are not there are read as the last one, and not written.
    row = tl.minimum(m, rows - 1).to(tl.int64)
    x_at = x_ptr + row[None, :] * (x_stride_8 * 8) + first * _SPAN_SIZE + k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for _ in tl.range(first, tl.minimum(first + spans_each, spans), num_stages=STAGES):
        words = tl.load(words_at)
        for group in tl.static_range(GROUPS_):
            meta = tl.load(meta_at + group * filled_up)
            scale = (meta & -256).to(tl.float32, bitcast=True)
            zero_bits = ((meta & 255) | MAGIC).to(tl.int16)
            part = acc if SCALES_WEIGHTS else tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for plane in tl.static_range(group * (GROUP // _PLANE_SIZE), (group + 1) * (GROUP // _PLANE_SIZE)):
                x = tl.load(x_at + plane * _PLANE_SIZE)
                weight = _difference(_plane(words, plane, MAGIC), zero_bits[:, None], TYPE)
                if SCALES_WEIGHTS:
                    weight = rounded(weight.to(tl.float32) * scale[:, None], TYPE)
                part = dot(weight, x, part)
            acc = part if SCALES_WEIGHTS else acc + part * scale[:, None]
        words_at += filled_up * _PLANE_SIZE
        meta_at += GROUPS_ * filled_up
        x_at += _SPAN_SIZE
    acc += tl.load(bias_ptr + n, mask=n < biases, other=0.0).to(tl.float32)[:, None]
    place = (tl.program_id(2).to(tl.int64) * rows + m) * outputs
    is_there = (n < outputs)[:, None] & (m < rows)[None, :]
    tl.store(out_ptr + place[None, :] + n[:, None], rounded(acc, out_ptr.dtype.element_ty), mask=is_there)


def _config(rows: int, outputs: int, *, warps: int, stages: int) -> KernelConfig:
    tiles = {"BLOCK_M": rows, "BLOCK_N": outputs, "STAGES": stages}
    return KernelConfig(tiles=tiles, num_warps=warps, num_stages=stages)


_FEW, _SOME = _config(16, 64, warps=4, stages=3), _config(32, 64, warps=4, stages=3)
_MANY = (_config(64, 128, warps=8, stages=2), _config(128, 128, warps=8, stages=2))
"""The second, which tuning may choose, needs more shared memory than AMD's GPUs have."""
_MOST_SPLIT_ROWS = 64
"""With more rows there are enough tiles, and what counts is how fast they are multiplied."""


def w4a16_configs(rows: int, *, one_way: bool = False, wide: bool = False) -> Sequence[KernelConfig]:
    """Return the ways to multiply so many rows; the first unless tuning has found another.

    ``one_way``: the same for any number of rows. ``wide``: results are float32, as sums that are added up later are;
    weights are not rounded for them.
    """
    if one_way or rows <= 16:
        return (_FEW,)
    return (_SOME,) if wide or rows <= _MOST_SPLIT_ROWS else _MANY


def compile_cases() -> Iterator[CompileCase]:
    """Return what ``linear_w4a16`` launches."""
    for dtype in (torch.bfloat16, torch.float16):
        for group in GROUPS:
            for config in (_FEW, _SOME, *_MANY):
                for out in (dtype,) if config in _MANY else (dtype, torch.float32):
                    yield CompileCase(
                        kernel=_w4a16_kernel,
                        name=f"{pointer(dtype)[1:]} groups of {group}{' wide' if out != dtype else ''}",
                        config=config,
                        signature={
                            "x_ptr": pointer(dtype),
                            **dict.fromkeys(("words_ptr", "meta_ptr"), "*i32"),
                            **dict.fromkeys(("bias_ptr", "out_ptr"), pointer(out)),
                            **dict.fromkeys(("rows", "outputs_16", "output_units", "spans", "spans_each"), "i32"),
                            **dict.fromkeys(("x_stride_8", "biases"), "i32"),
                        },
                        constants={"GROUP": group, "SCALES_WEIGHTS": config in _MANY},
                        targets=tuple(target for target in ALL_TARGETS if target != "gfx942" or config != _MANY[1]),
                    )


def linear_w4a16(
    x_TI: Tensor, matrix: Int4Matrix, bias_O: Tensor | None = None, *, one_way: bool = False, wide: bool = False
) -> Tensor:
    """As ``linear_w4a16_reference``; ``wide``: the result is float32.

    ``one_way``: the same arithmetic for any number of rows, so that a row's bits never depend on how many there are

    Raises: ValueError when x has other inputs than the matrix
    """
    if x_TI.dim() != 2 or x_TI.shape[1] != matrix.inputs:
        raise ValueError(f"x_TI: [tokens, {matrix.inputs}] is multiplied with this matrix, got {list(x_TI.shape)}")
    if not uses_triton("linear_w4a16", x_TI) or x_TI.dtype not in (torch.bfloat16, torch.float16):
        return linear_w4a16_reference(x_TI, matrix, bias_O, wide=wide)
    dtype = torch.float32 if wide else x_TI.dtype
    if matrix.order_I is not None:
        x_TI = x_TI.index_select(1, matrix.order_I)
    if matrix.inputs % SPAN:
        x_TI = functional.pad(x_TI, (0, -matrix.inputs % SPAN))
    elif x_TI.stride(1) != 1 or x_TI.stride(0) % _ALIGNED:
        x_TI = x_TI.contiguous()
    if bias_O is not None:
        bias_O = bias_O.to(dtype).contiguous()
    out_TO = empty_outputs(x_TI, matrix.outputs, dtype)
    configs = w4a16_configs(x_TI.shape[0], one_way=one_way, wide=wide)
    spans, filled_up, _ = matrix.words_SOW.shape
    is_split = one_way or x_TI.shape[0] <= _MOST_SPLIT_ROWS
    splits = split_count(filled_up // configs[0].tiles["BLOCK_N"], spans, one_way=one_way) if is_split else 1
    if splits == 1:
        _multiply(x_TI, matrix, bias_O, out_TO.unsqueeze(0), configs)
        return out_TO[:, : matrix.outputs].contiguous()
    for first in range(0, x_TI.shape[0], _ROWS_AT_ONCE):
        some = slice(first, first + _ROWS_AT_ONCE)
        parts_STO = torch.empty(splits, *out_TO[some].shape, dtype=torch.float32, device=x_TI.device)
        _multiply(x_TI[some], matrix, None, parts_STO, configs)
        split_sums_(out_TO[some], parts_STO, bias_O=bias_O)
    return out_TO[:, : matrix.outputs].contiguous()


def _multiply(
    x_TI: Tensor, matrix: Int4Matrix, bias_O: Tensor | None, parts_STO: Tensor, configs: Sequence[KernelConfig]
) -> None:
    """Multiply into ``parts_STO`` [splits, rows, outputs], these filled up to a multiple of 16."""
    spans, filled_up, _ = matrix.words_SOW.shape
    splits, rows, outputs = parts_STO.shape
    launch_tuned(
        _w4a16_kernel,
        lambda config: (filled_up // config.tiles["BLOCK_N"], -(-rows // config.tiles["BLOCK_M"]), splits),
        configs,
        (x_TI.dtype, matrix.group, matrix.outputs, matrix.inputs, next_power_of_2(rows)),
        x_ptr=x_TI,
        words_ptr=matrix.words_SOW,
        meta_ptr=matrix.meta_GO,
        bias_ptr=parts_STO if bias_O is None else bias_O,
        out_ptr=parts_STO,
        rows=rows,
        outputs_16=outputs // 16,
        output_units=filled_up // _OUTPUT_UNIT,
        spans=spans,
        spans_each=-(-spans // splits),
        x_stride_8=x_TI.stride(0) // _ALIGNED,
        biases=0 if bias_O is None else matrix.outputs,
        GROUP=matrix.group,
        SCALES_WEIGHTS=configs is _MANY,
    )
