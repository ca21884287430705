"""What tells two models apart before any KV passes between them: one short name for the function that weights compute.

Made of the configuration as it was understood, and of each weight file's name, size, header and some of its bytes, so
that another fine-tune of the same model is another one. Not all bytes: a replica must not read its weights twice.
"""

from __future__ import annotations

from pathlib import Path

import xxhash

from ...sdk.errors import CheckpointError
from .model_spec import ModelSpec

_SAMPLES = 256
_SAMPLE_BYTES = 4096
_MAX_HEADER_BYTES = 100_000_000


def model_fingerprint(directory: Path, spec: ModelSpec, *, quantization: str) -> str:
    """Return the fingerprint of a model's weights as they are multiplied with.

    Raises: CheckpointError naming the file that cannot be read
    """
    digest = xxhash.xxh3_128(repr((spec, quantization)).encode())
    for path in sorted(directory.glob("*.safetensors")):
        try:
            _add_file(digest, path)
        except OSError as error:
            raise CheckpointError(str(path), f"cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _add_file(digest: xxhash.xxh3_128, path: Path) -> None:
    """Add a file's name, its size, its header, and pages at even distances."""
    size = path.stat().st_size
    digest.update(repr((path.name, size)).encode())
    with path.open("rb") as file:
        head = file.read(8)
        length = min(int.from_bytes(head, "little"), size, _MAX_HEADER_BYTES)
        digest.update(head + file.read(length))
        first = len(head) + length
        for index in range(_SAMPLES):
            file.seek(first + (size - first) * index // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
