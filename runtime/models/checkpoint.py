"""Safetensors on disk: headers read without data, data read in slices from a memory map.

Owns the files of a checkpoint and everything that can be wrong with them. Knows nothing of models. Never
opens a pickle file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...sdk.errors import CheckpointError
from .config_fields import ConfigFields, read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""Types of plain numbers."""
CODE_BYTES = {"I32": 4, "F8_E4M3": 1, "U8": 1}
"""Types of quantized ones."""
MAX_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHeader:
    """What a file's header says of one tensor; ``dtype`` is the format's name, such as BF16."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class CheckpointReader:
    """The tensors of one directory. A context manager: the files are closed when it ends, however it ends."""

    def __init__(self, tensors: Mapping[str, TensorHeader]) -> None:
        """Take the headers; files are opened when first read from. Use ``open``."""
        self.tensors = tensors
        self._files: dict[Path, Any] = {}
        self._open_files = ExitStack()

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Read and check the headers of all weight files of ``directory``.

        Raises: CheckpointError naming the file, and the tensor where there is one: no weights, pickle files
        only, a broken index, a missing shard, a file cut short.
        """
        if (directory / SINGLE_FILE).exists():
            return cls(read_headers(directory / SINGLE_FILE))
        if (directory / INDEX_FILE).exists():
            return cls(_sharded_headers(directory, read_json(directory / INDEX_FILE)))
        raise _no_weights(directory)

    def read_into(self, name: str, target: Tensor, *, region: tuple[slice, ...] = ()) -> None:
        """Copy a stored tensor, or the ``region`` of it, into ``target``, converting its type on the way.

        Shapes: region: one slice for each of the leading axes, such as the rows or columns of one rank;
        target of the region's shape, any float type and device
        Raises: CheckpointError when the file cannot be read.
        """
        target.copy_(self.read(name, region=region))

    def read(self, name: str, *, region: tuple[slice, ...] = ()) -> Tensor:
        """Return a stored tensor, or the ``region`` of it, of its own type.

        Raises: CheckpointError when the file cannot be read.
        """
        header = self.tensors[name]
        try:
            file = self._file(header.file)
            stored: Tensor = file.get_slice(name)[region or slice(None)] if header.shape else file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(str(header.file), f"cannot be read: {error}", tensor=name) from error
        return stored

    @property
    def has_open_files(self) -> bool:
        """Say whether any file is open at this moment."""
        return bool(self._files)

    def __enter__(self) -> Self:
        """Return the reader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close every file."""
        self._files.clear()
        self._open_files.close()

    def _file(self, path: Path) -> Any:
        if path not in self._files:
            self._files[path] = self._open_files.enter_context(safe_open(str(path), framework="pt", device="cpu"))
        return self._files[path]


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """Read the header of one safetensors file and hold it against the file's size.

    Raises: CheckpointError when the file is not one, or is shorter or longer than its header says.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > min(file_bytes - 8, MAX_HEADER_BYTES):
                raise CheckpointError(str(path), "is truncated or not a safetensors file: its header is not all there")
            header = json.loads(file.read(header_bytes))
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(path), f"has a header that is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(str(path), "has a header that is not a JSON object")
    header.pop("__metadata__", None)
    return _checked_entries(path, header, data_bytes=file_bytes - 8 - header_bytes)


def _checked_entries(path: Path, header: Mapping[str, object], *, data_bytes: int) -> dict[str, TensorHeader]:
    tensors: dict[str, TensorHeader] = {}
    largest_end = 0
    for name, entry in header.items():
        tensors[name], end = _entry(path, name, entry)
        largest_end = max(largest_end, end)
        if end > data_bytes:
            raise CheckpointError(
                str(path), f"file is truncated: data ends at byte {data_bytes}, this needs {end}", tensor=name
            )
    if largest_end != data_bytes:
        raise CheckpointError(str(path), f"holds {data_bytes - largest_end} bytes that belong to no tensor")
    return tensors


def _entry(path: Path, name: str, entry: object) -> tuple[TensorHeader, int]:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if all(
            isinstance(size, int) and size >= 0 for size in shape
        ):
            element_bytes = (DTYPE_BYTES | CODE_BYTES).get(dtype)
            if begin < 0 or end < begin or (element_bytes and end - begin != prod(shape) * element_bytes):
                raise CheckpointError(str(path), f"offsets {begin} to {end} do not fit shape {shape}", tensor=name)
            return TensorHeader(file=path, dtype=dtype, shape=tuple(shape)), end
    raise CheckpointError(str(path), "has a header entry that is not one of a tensor", tensor=name)


def _sharded_headers(directory: Path, index: ConfigFields) -> dict[str, TensorHeader]:
    shard_of = index.table("weight_map").values
    if not shard_of:
        raise index.problem("weight_map", "is missing or empty")
    shards: dict[str, dict[str, TensorHeader]] = {}
    for name, shard in shard_of.items():
        if not isinstance(shard, str) or Path(shard).name != shard or Path(shard).suffix != ".safetensors":
            raise CheckpointError(
                index.file, f"must be in a safetensors file of the same directory, got {shard!r}", tensor=name
            )
        if shard not in shards:
            if not (directory / shard).exists():
                raise CheckpointError(index.file, f"is said to be in {shard}, which is missing", tensor=name)
            shards[shard] = read_headers(directory / shard)
        if name not in shards[shard]:
            raise CheckpointError(str(directory / shard), "is missing, though the index says it is here", tensor=name)
    # A tensor that only a shard knows is kept: the check for unexpected tensors must see it.
    tensors = {name: header for headers in shards.values() for name, header in headers.items()}
    return tensors | {name: shards[str(shard)][name] for name, shard in shard_of.items()}


def _no_weights(directory: Path) -> CheckpointError:
    pickles = sorted(file.name for file in directory.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        return CheckpointError(
            str(directory / pickles[0]),
            "is a pickle file, which can run code when opened; it is never read. Convert the checkpoint to "
            "safetensors where you trust it, with transformers: "
            "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)",
        )
    return CheckpointError(str(directory), f"has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")
