"""Names a prompt's blocks as the engines that cache them do: chained digests, made only as far as they are asked for.

A core. Most prompts share their beginnings with prompts before them, so digests are kept by strides of several blocks:
looking a stride up costs a twentieth of making it. What is kept is bounded, least recently used first out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from ..config import prefix_cache_key
from ..engine.kv_blocks import chain_digest, root_digest
from ..messages import Int32Array

STRIDE_BLOCKS = 32
SHORT_BYTES = 16
"""How much of a digest replicas say in ``BlockChanges``."""


@dataclass(slots=True)
class _Stride:
    """Some blocks in a row, as far as they were asked for: short digests, and the whole digest of the last."""

    shorts: tuple[bytes, ...]
    last: bytes


class PromptDigests:
    """Digests for replicas of one block size; keeps the strides that were asked for last."""

    def __init__(self, *, block_size: int, rope_threshold: int | None = None, max_strides: int = 4096) -> None:
        self._block_size = block_size
        self._rope_threshold = rope_threshold
        self._max_strides = max_strides
        self._strides: OrderedDict[tuple[bytes, bytes], _Stride] = OrderedDict()

    def strides(self, prompt: Int32Array, *, generated: int, cache_salt: str | None) -> Iterator[tuple[bytes, ...]]:
        """Yield the short digests of a prompt's full blocks, some at a time; a block at a time where none is kept.

        Shapes: prompt [known tokens] int32, of which the last ``generated`` came after the prompt
        """
        size, known = self._block_size, self._strides
        parent = root_digest(cache_salt, prefix_cache_key(len(prompt) - generated, self._rope_threshold))
        blocks = len(prompt) // size
        for first in range(0, blocks, STRIDE_BLOCKS):
            count = min(STRIDE_BLOCKS, blocks - first)
            data = prompt[first * size : (first + count) * size].tobytes()
            key = (parent, data)
            stride = known.get(key)
            if stride is None:
                stride = known[key] = _Stride((), parent)
            else:
                known.move_to_end(key)
                if stride.shorts:
                    yield stride.shorts
            while len(stride.shorts) < count:
                start = len(stride.shorts) * 4 * size
                stride.last = chain_digest(stride.last, data[start : start + 4 * size])
                stride.shorts += (stride.last[:SHORT_BYTES],)
                # One who finds that nobody has this block asks for no more.
                yield stride.shorts[-1:]
            parent = stride.last
            if len(known) > self._max_strides:
                known.popitem(last=False)
