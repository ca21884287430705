"""Weights of quantized checkpoints: which tensors one consists of, and how a rank's part of it is read.

Owns the names and shapes on disk; what the numbers mean is said by ``kernels.int4_codes`` and its like. MXFP4 always
becomes plain numbers. A weight that a quantized checkpoint has as plain numbers is read like any other.

Shapes: O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from itertools import groupby

from torch import Tensor

from ...kernels import float8_codes, int4_codes
from ...kernels.float8_codes import Float8Codes
from ...kernels.int4_codes import Int4Codes
from ...kernels.mxfp4_codes import BLOCK, mxfp4_weight
from ...sdk.errors import CheckpointError
from .checkpoint import CheckpointReader
from .layout import Parameter, Piece, Role
from .model_spec import StoredAs

Codes = Int4Codes | Float8Codes

_WORD = 8
_SCALES = ("weight_scale_inv", "weight_scale")


def is_stored_in_codes(piece: Piece, stored_as: StoredAs | None, reader: CheckpointReader) -> bool:
    """Return whether a piece is quantized on disk."""
    if stored_as is None:
        return False
    if stored_as.method == "mxfp4":
        return f"{piece.tensor}_blocks" in reader.tensors
    if not piece.tensor.endswith(".weight"):
        return False
    if stored_as.method == "fp8":
        header = reader.tensors.get(piece.tensor)
        return header is not None and header.dtype == "F8_E4M3"
    return f"{_stem(piece)}.qweight" in reader.tensors


def code_tensors(piece: Piece, stored_as: StoredAs, stored: Container[str]) -> Iterator[tuple[str, str, list[int]]]:
    """Yield the tensors that a quantized piece consists of: name, type on disk, "" for any float, and shape.

    Scales of float8 numbers come in several shapes, which are checked as they are read.
    """
    if stored_as.method == "mxfp4":
        *rows, inputs = piece.shape
        yield f"{piece.tensor}_blocks", "U8", [*rows, inputs // BLOCK, BLOCK // 2]
        yield f"{piece.tensor}_scales", "U8", [*rows, inputs // BLOCK]
        return
    (outputs, inputs), stem = piece.shape, _stem(piece)
    if stored_as.method == "fp8":
        yield piece.tensor, "F8_E4M3", [outputs, inputs]
        return
    groups = inputs // (stored_as.group or inputs)
    is_awq = stored_as.method == "awq"
    yield f"{stem}.qweight", "I32", [inputs, outputs // _WORD] if is_awq else [inputs // _WORD, outputs]
    yield f"{stem}.qzeros", "I32", [groups, outputs // _WORD]
    yield f"{stem}.scales", "", [groups, outputs]
    if f"{stem}.g_idx" in stored:
        yield f"{stem}.g_idx", "I32", [inputs]


def names_of(piece: Piece, stored_as: StoredAs, stored: Container[str]) -> set[str]:
    """Return the names of all tensors of a quantized piece, and of those that it makes unnecessary."""
    names = {name for name, _, _ in code_tensors(piece, stored_as, stored)}
    # Rows of activations have scales of their own, as they come.
    return names | {f"{_stem(piece)}.{each}" for each in (*_SCALES, "input_scale")}


def read_codes(reader: CheckpointReader, parameter: Parameter, stored_as: StoredAs) -> tuple[Codes, ...]:
    """Read a parameter of which all pieces are quantized: one weight, or that of each expert.

    Raises: CheckpointError naming the file and the tensor
    """
    if parameter.role not in (Role.EXPERTS, Role.SUMMED_EXPERTS):
        return (_joined(reader, parameter.pieces, stored_as),)
    by_expert = groupby(parameter.pieces, key=lambda piece: piece.place[0])
    return tuple(_joined(reader, tuple(pieces), stored_as) for _, pieces in by_expert)


def read_piece(reader: CheckpointReader, piece: Piece, stored_as: StoredAs) -> Tensor:
    """Read one quantized piece as plain numbers. Raises: CheckpointError"""
    if stored_as.method == "mxfp4":
        return _read_mxfp4(reader, piece)
    return _joined(reader, (piece,), stored_as).weight()


def _read_mxfp4(reader: CheckpointReader, piece: Piece) -> Tensor:
    """Read some experts' weights."""
    stored = f"{piece.tensor}_blocks"
    experts, rows, columns = [*piece.region, slice(None), slice(None)][:3]
    try:
        if piece.shape[-1] % BLOCK:
            raise ValueError(f"has {piece.shape[-1]} inputs, {BLOCK} of which share a scale")
        start, stop, _ = columns.indices(piece.shape[-1])
        blocks = _parts(slice(start, stop), BLOCK, f"{BLOCK} inputs share a scale")
    except ValueError as error:
        raise CheckpointError(str(reader.tensors[stored].file), str(error), tensor=stored) from error
    region = (experts, rows, blocks)
    return mxfp4_weight(reader.read(stored, region=region), reader.read(f"{piece.tensor}_scales", region=region))


def _joined(reader: CheckpointReader, pieces: tuple[Piece, ...], stored_as: StoredAs) -> Codes:
    """Return the outputs of all pieces as one weight; layouts name pieces in the order of their outputs."""
    try:
        if stored_as.method == "fp8":
            return float8_codes.concatenated([_read_float8(reader, piece, stored_as) for piece in pieces])
        return int4_codes.concatenated([_read_int4(reader, piece, stored_as) for piece in pieces])
    except ValueError as error:
        header = reader.tensors.get(pieces[0].tensor) or reader.tensors[f"{_stem(pieces[0])}.qweight"]
        raise CheckpointError(str(header.file), str(error), tensor=pieces[0].tensor) from error


def _read_int4(reader: CheckpointReader, piece: Piece, stored_as: StoredAs) -> Int4Codes:
    stem, group = _stem(piece), stored_as.group or piece.shape[1]
    rows, columns = _region(piece)
    output_words = _parts(rows, _WORD, "eight outputs share a word")
    groups = _parts(columns, group, f"{group} inputs share a scale")
    scales_GO = reader.read(f"{stem}.scales", region=(groups, rows))
    qzeros_GW = reader.read(f"{stem}.qzeros", region=(groups, output_words))
    if stored_as.method == "awq":
        return int4_codes.read_awq(reader.read(f"{stem}.qweight", region=(columns, output_words)), qzeros_GW, scales_GO)
    input_words = _parts(columns, _WORD, "eight inputs share a word")
    qweight_WO = reader.read(f"{stem}.qweight", region=(input_words, rows))
    g_idx_I = None
    if f"{stem}.g_idx" in reader.tensors:
        g_idx_I = reader.read(f"{stem}.g_idx", region=(columns,)) - groups.start
        is_cut = columns.stop - columns.start < piece.shape[1]
        if is_cut and bool((g_idx_I.diff() < 0).any()):
            raise ValueError("inputs in an order of their own (act-order) cannot be divided over tensor-parallel ranks")
    return int4_codes.read_gptq(qweight_WO, qzeros_GW, scales_GO, g_idx_I, zeros_less_one=stored_as.zeros_less_one)


def _read_float8(reader: CheckpointReader, piece: Piece, stored_as: StoredAs) -> Float8Codes:
    outputs = piece.shape[0]
    rows, columns = _region(piece)
    values_OI = reader.read(piece.tensor, region=(rows, columns))
    name = next((each for suffix in _SCALES if (each := f"{_stem(piece)}.{suffix}") in reader.tensors), None)
    if name is None:
        raise ValueError(f"has no scales: neither {_SCALES[0]} nor {_SCALES[1]}")
    scales = reader.read(name).float()
    if scales.numel() == 1:
        scales_OB = scales.reshape(1, 1).expand(outputs, 1)
    elif list(scales.shape) in ([outputs], [outputs, 1]):
        scales_OB = scales.reshape(outputs, 1)
    else:
        return _in_blocks(piece, stored_as, values_OI, scales)
    return Float8Codes(values_OI=values_OI, scales_OB=scales_OB[rows].contiguous(), block=columns.stop - columns.start)


def _in_blocks(piece: Piece, stored_as: StoredAs, values_OI: Tensor, scales_BB: Tensor) -> Float8Codes:
    outputs, inputs = piece.shape
    block_outputs, block = stored_as.block_outputs or outputs, stored_as.group or inputs
    if list(scales_BB.shape) != [-(-outputs // block_outputs), -(-inputs // block)]:
        raise ValueError(f"scales of shape {list(scales_BB.shape)} do not fit blocks of {block_outputs} x {block}")
    rows, columns = _region(piece)
    if columns.start % block:
        raise ValueError(f"blocks of {block} inputs cannot be cut at input {columns.start}: use another degree")
    blocks = slice(columns.start // block, -(-columns.stop // block))
    scales_OB = scales_BB.repeat_interleave(block_outputs, dim=0)[rows, blocks]
    return Float8Codes(values_OI=values_OI, scales_OB=scales_OB.contiguous(), block=block)


def _stem(piece: Piece) -> str:
    return piece.tensor.removesuffix(".weight")


def _region(piece: Piece) -> tuple[slice, slice]:
    """Return the outputs and the inputs of a piece, both as ranges with ends."""
    regions = [*piece.region, slice(None), slice(None)][:2]
    rows, columns = (slice(*region.indices(size)[:2]) for region, size in zip(regions, piece.shape, strict=True))
    return rows, columns


def _parts(numbers: slice, size: int, why: str) -> slice:
    """Return the range of parts of ``size`` that a range of numbers consists of."""
    if numbers.start % size or numbers.stop % size:
        raise ValueError(f"cannot be cut at {numbers.start} and {numbers.stop}, {why}: use another degree")
    return slice(numbers.start // size, numbers.stop // size)
