"""From files to parameters: everything is checked first, then each parameter is allocated and filled in
place.

Owns the order: names, shapes and types of all tensors are held against the spec before anything is allocated,
and nothing stays when loading fails. At most one tensor beyond the parameters exists at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ...sdk.errors import CheckpointError
from .checkpoint import DTYPE_BYTES, CheckpointReader
from .layout import Parameter, Piece, Role, expert_layout, is_ignorable, parameter_layout
from .model_spec import ModelSpec, StoredAs
from .sharding import WHOLE, Shard
from .stored_weights import Codes, code_tensors, is_stored_in_codes, names_of, read_codes, read_piece

Loaded = Tensor | tuple[Codes, ...]
"""A parameter as plain numbers, or the quantized weights that it consists of."""

_PRODUCTS = (Role.LINEAR, Role.SUMMED, Role.EXPERTS, Role.SUMMED_EXPERTS)

Progress = Callable[[float], None]
"""Is told, time and again, the share of a rank's weights that is loaded; the last is 1."""


def read_parameters(
    path: str | Path,
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    shard: Shard = WHOLE,
    progress: Progress | None = None,
) -> Iterator[tuple[Parameter, Loaded]]:
    """Read every parameter of ``spec``, or a rank's part of it, from the directory ``path``, one after the other.

    Weights of linear layers that are quantized come as they are stored, on the CPU: one, or one an expert.

    ``progress`` hears of a parameter when the next one is asked for: by then it has been turned into what is kept.

    Raises: CheckpointError naming the file and the tensor.
    """
    directory = Path(path)
    with CheckpointReader.open(directory) as reader:
        # Every rank checks the whole model: all of them refuse a checkpoint, with the same words.
        check_tensors(directory, reader, parameter_layout(spec, reader.tensors), spec)
        layout = parameter_layout(spec, reader.tensors, shard)
        # Of one type all: numbers are as good as bytes.
        total, done = sum(prod(parameter.shape) for parameter in layout), 0
        for parameter in layout:
            yield parameter, _load_or_keep(reader, parameter, spec, dtype, device)
            done += prod(parameter.shape)
            if progress is not None:
                progress(done / total)


def read_expert(
    path: str | Path,
    spec: ModelSpec,
    *,
    layer: int,
    expert: int,
    dtype: torch.dtype,
    device: torch.device,
    shard: Shard,
) -> tuple[Tensor, Tensor]:
    """Read one expert's weights, as much of them as the rank has; ``layer`` is counted as the rank has them.

    Shapes: returns gate_up [2 * own intermediate, hidden], down [hidden, own intermediate]
    Raises: CheckpointError
    """
    with CheckpointReader.open(Path(path)) as reader:
        parts = expert_layout(spec, reader.tensors, shard, layer=layer, expert=expert)
        gate_up, down = (_load(reader, part, spec, dtype, device)[0] for part in parts)
    return gate_up, down


def check_tensors(directory: Path, reader: CheckpointReader, layout: tuple[Parameter, ...], spec: ModelSpec) -> None:
    """Hold the stored tensors against the layout: all there, of the right shape and type, and no others.

    Raises: CheckpointError naming the file and the tensor.
    """
    expected: set[str] = set()
    for piece in (piece for parameter in layout for piece in parameter.pieces):
        if spec.stored_as is not None and is_stored_in_codes(piece, spec.stored_as, reader):
            _check_codes(directory, reader, piece, spec.stored_as)
            expected |= names_of(piece, spec.stored_as, reader.tensors)
        else:
            _check_tensor(directory, reader, piece)
            expected.add(piece.tensor)
    for name, header in reader.tensors.items():
        if name not in expected and not is_ignorable(name, spec):
            raise CheckpointError(
                str(header.file),
                f"is unexpected: {spec.architecture} as configured has no use for it",
                tensor=name,
            )


def _check_tensor(directory: Path, reader: CheckpointReader, piece: Piece) -> None:
    header = reader.tensors.get(piece.tensor)
    if header is None:
        raise CheckpointError(str(directory), "is missing from the checkpoint", tensor=piece.tensor)
    if header.shape != piece.shape:
        problem = f"has shape {list(header.shape)}, config.json asks for {list(piece.shape)}"
        raise CheckpointError(str(header.file), problem, tensor=piece.tensor)
    if header.dtype not in DTYPE_BYTES:
        problem = f"has type {header.dtype}, supported are {', '.join(DTYPE_BYTES)}"
        raise CheckpointError(str(header.file), problem, tensor=piece.tensor)


def _check_codes(directory: Path, reader: CheckpointReader, piece: Piece, stored_as: StoredAs) -> None:
    for name, dtype, shape in code_tensors(piece, stored_as, reader.tensors):
        header = reader.tensors.get(name)
        if header is None:
            raise CheckpointError(str(directory), "is missing from the checkpoint", tensor=name)
        if list(header.shape) != shape:
            problem = f"has shape {list(header.shape)}, config.json asks for {shape}"
            raise CheckpointError(str(header.file), problem, tensor=name)
        if header.dtype not in ([dtype] if dtype else DTYPE_BYTES):
            raise CheckpointError(
                str(header.file), f"has type {header.dtype}, wanted {dtype or 'a float'}", tensor=name
            )


def _load_or_keep(
    reader: CheckpointReader, parameter: Parameter, spec: ModelSpec, dtype: torch.dtype, device: torch.device
) -> Loaded:
    may_keep = spec.stored_as is not None and parameter.role in _PRODUCTS
    if may_keep and all(is_stored_in_codes(piece, spec.stored_as, reader) for piece in parameter.pieces):
        assert spec.stored_as is not None
        return read_codes(reader, parameter, spec.stored_as)
    return _load(reader, parameter, spec, dtype, device)


def _load(
    reader: CheckpointReader, parameter: Parameter, spec: ModelSpec, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return a parameter as plain numbers."""
    tensor = torch.empty(parameter.shape, dtype=torch.float32 if parameter.is_wide else dtype, device=device)
    for piece in parameter.pieces:
        if spec.stored_as is not None and is_stored_in_codes(piece, spec.stored_as, reader):
            piece.place_in(tensor).copy_(read_piece(reader, piece, spec.stored_as).weight())
        else:
            reader.read_into(piece.tensor, piece.place_in(tensor), region=piece.region)
    return tensor
