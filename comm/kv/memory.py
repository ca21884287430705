"""A rank's KV as bytes: where the tokens of a frame lie. Views of memory, no copies.

Shapes: a layer is [2, num_blocks, heads, block_size, row_bytes], contiguous, so that a run of heads of a block is one
run of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..errors import CommMisuse


@dataclass(frozen=True, slots=True, kw_only=True)
class KvShape:
    """Which part of a model a rank holds, and in what blocks. Layers and heads are the model's.

    Units: row_bytes, of one head of one token, keys alone
    """

    layers: range
    heads: range
    num_blocks: int
    block_size: int
    row_bytes: int

    @property
    def layer_bytes(self) -> int:
        """The bytes of one layer."""
        return 2 * self.num_blocks * len(self.heads) * self.block_size * self.row_bytes


class KvMemory:
    """The memory of all layers of a rank, which stays where it is while a transport has it.

    Raises: CommMisuse when layers are missing, too many, of another size, read-only, or lie over one another
    """

    def __init__(self, shape: KvShape, layers: Sequence[memoryview]) -> None:
        if len(layers) != len(shape.layers):
            raise CommMisuse(f"memory for {len(layers)} layers was registered, the rank has {len(shape.layers)}")
        self.shape = shape
        self._layers = [_flat(layer, shape.layer_bytes) for layer in layers]
        placed = sorted((np.frombuffer(view, dtype=np.uint8).ctypes.data, view.nbytes) for view in self._layers)
        for (first, size), (second, _) in pairwise(placed):
            if first + size > second:
                raise CommMisuse("memory of two layers overlaps, or one was registered twice")

    def runs(self, layer: int, heads: range, cuts: Sequence[int], blocks: Sequence[int]) -> list[memoryview]:
        """Return the bytes of some heads of a layer, in the order of frames; neighbours are one run.

        ``cuts``: token positions, no two of them further apart than a block, none inside of one unless it is the first
        or last, or the other end's block ends there; ``blocks``: of the prompt, from its first token
        """
        shape, view = self.shape, self._layers[layer - self.shape.layers.start]
        size = shape.block_size
        head_bytes = size * shape.row_bytes
        block_bytes = len(shape.heads) * head_bytes
        skipped = (heads.start - shape.heads.start) * head_bytes
        whole = len(heads) * head_bytes
        starts: list[int] = []
        stops: list[int] = []
        last = -1
        for first, stop in pairwise(cuts):
            at = skipped + blocks[first // size] * block_bytes
            if stop - first == size:
                # Of a whole block, the heads lie one behind the other.
                if at == last:
                    last = at + whole
                    stops[-1] = last
                    continue
                starts.append(at)
                last = at + whole
                stops.append(last)
                continue
            at += first % size * shape.row_bytes
            length = (stop - first) * shape.row_bytes
            starts += range(at, at + whole, head_bytes)
            stops += range(at + length, at + whole + length, head_bytes)
            last = -1
        # Values lie as keys do, behind them.
        behind = shape.num_blocks * block_bytes
        runs = [view[start:stop] for start, stop in zip(starts, stops, strict=True)]
        runs += [view[start + behind : stop + behind] for start, stop in zip(starts, stops, strict=True)]
        return runs


def _flat(layer: memoryview, wanted_bytes: int) -> memoryview:
    if layer.readonly or not layer.c_contiguous:
        raise CommMisuse("memory of a layer has to be writable and contiguous")
    if layer.nbytes != wanted_bytes:
        raise CommMisuse(f"a layer's memory has {layer.nbytes} bytes, its shape says {wanted_bytes}")
    return layer if layer.ndim == 1 and layer.format == "B" else layer.cast("B")
