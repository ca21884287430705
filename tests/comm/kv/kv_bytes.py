"""KV with known contents: what every byte of a prompt should be, in any layout, and whether it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from slipstream.comm.kv.memory import KvMemory
from slipstream.comm.kv.runs import KvShape
from slipstream.placement.kv_routes import KvLayout

UNTOUCHED = 0xEE


def truth(layout: KvLayout, tokens: int, row_bytes: int, seed: int, *, parts: int = 2) -> NDArray[np.uint8]:
    """Return what a prompt's KV is; no byte is what untouched memory holds.

    Shapes: [layers, parts, kv_heads, tokens, row_bytes]
    """
    shape = (layout.layers, parts, layout.kv_heads, tokens, row_bytes)
    return np.random.default_rng(seed).integers(0, UNTOUCHED, shape, dtype=np.uint8)


class RankKv:
    """One rank's memory."""

    def __init__(self, layout: KvLayout, rank: int, *, num_blocks: int, row_bytes: int, parts: int = 2) -> None:
        self.layout = layout
        self.layers, self.heads = layout.layers_of(rank), layout.heads_of(rank)
        shape = (len(self.layers), parts, num_blocks, len(self.heads), layout.block_size, row_bytes)
        self.array = np.full(shape, UNTOUCHED, dtype=np.uint8)
        self.memory = KvMemory(
            KvShape(
                layers=self.layers,
                heads=self.heads,
                num_blocks=num_blocks,
                block_size=layout.block_size,
                row_bytes=row_bytes,
                parts=parts,
            ),
            [memoryview(layer) for layer in self.array],
        )

    def write(self, layer: int, tokens: range, blocks: Sequence[int], what: NDArray[np.uint8]) -> None:
        """Put the truth of some tokens of a layer into its blocks."""
        at, block, offset = self._where(tokens, blocks)
        heads = what[layer, :, self.heads.start : self.heads.stop, tokens.start : tokens.stop]
        self.array[layer - self.layers.start][:, block, :, offset] = heads.transpose(2, 0, 1, 3)[at]

    def read(self, layer: int, tokens: range, blocks: Sequence[int]) -> NDArray[np.uint8]:
        """Return what the blocks of some tokens hold. Shapes: [parts, heads, tokens, row_bytes]"""
        _, block, offset = self._where(tokens, blocks)
        found: NDArray[np.uint8] = self.array[layer - self.layers.start][:, block, :, offset].transpose(1, 2, 0, 3)
        return found

    def holds(self, tokens: range, blocks: Sequence[int], what: NDArray[np.uint8]) -> bool:
        """Return whether all of the rank's layers hold the truth."""
        return all(
            np.array_equal(
                self.read(layer, tokens, blocks),
                what[layer, :, self.heads.start : self.heads.stop, tokens.start : tokens.stop],
            )
            for layer in self.layers
        )

    def _where(
        self, tokens: range, blocks: Sequence[int]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        positions = np.arange(tokens.start, tokens.stop)
        size = self.layout.block_size
        return positions - tokens.start, np.asarray(blocks, dtype=np.int64)[positions // size], positions % size
