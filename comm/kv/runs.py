"""Where the bytes of a frame lie in a layer's memory, as numbers. Pure.

Owns the order of a frame's bytes: keys, then values; piece by piece of its tokens; of a piece, head by head. Neighbours
are one run. A layer is [parts, num_blocks, heads, block_size, row_bytes], contiguous; the parts are keys and values, or
latents alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvShape:
    """Which part of a model a rank holds, and in what blocks. Layers and heads are the model's.

    ``parts``: 2 where there are keys and values, 1 where latents stand for both.
    Units: row_bytes, of one head of one token, one part
    """

    layers: range
    heads: range
    num_blocks: int
    block_size: int
    row_bytes: int
    parts: int = 2

    @property
    def entry_bytes(self) -> int:
        """The bytes of one head of one token, all parts."""
        return self.parts * self.row_bytes

    @property
    def layer_bytes(self) -> int:
        """The bytes of one layer."""
        return self.num_blocks * len(self.heads) * self.block_size * self.entry_bytes

    def places(self, heads: range, cuts: Sequence[int], blocks: Sequence[int]) -> tuple[Numbers, Numbers]:
        """Return where each run of some heads begins in a layer, and how long it is, in bytes.

        ``cuts``: token positions, no two of them further apart than a block, none inside of one unless it is the first
        or last, or the other end's block ends there; ``blocks``: of the prompt, from its first token
        """
        size = self.block_size
        head_bytes = size * self.row_bytes
        block_bytes = len(self.heads) * head_bytes
        ends = np.asarray(cuts, dtype=np.int64)
        first, tokens = ends[:-1], np.diff(ends)
        block = first // size
        low, high = int(block[0]), int(block[-1])
        number = np.asarray(blocks[low : high + 1], dtype=np.int64)[block - low]
        starts = number * block_bytes + (heads.start - self.heads.start) * head_bytes + first % size * self.row_bytes
        lengths = tokens * self.row_bytes
        # Of a whole block, the heads lie one behind the other; of a part of one they do not.
        split = np.where(tokens == size, 1, len(heads))
        if split.max() > 1:
            head = np.arange(split.sum()) - np.repeat(np.cumsum(split) - split, split)
            starts = np.repeat(starts, split) + head * head_bytes
            lengths = np.repeat(np.where(split == 1, lengths * len(heads), lengths), split)
        else:
            lengths = lengths * len(heads)
        starts, lengths = _joined(starts, lengths)
        # Values lie as keys do, behind them.
        parts = np.arange(self.parts)[:, None] * (self.num_blocks * block_bytes)
        return (starts + parts).ravel(), np.tile(lengths, self.parts)


def _joined(starts: Numbers, lengths: Numbers) -> tuple[Numbers, Numbers]:
    """Make one run of each that begins where the one before it ends."""
    begins = np.concatenate(([True], starts[1:] != starts[:-1] + lengths[:-1]))
    if begins.all():
        return starts, lengths
    return starts[begins], np.add.reduceat(lengths, np.flatnonzero(begins))
