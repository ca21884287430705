"""Decoding steps captured as graphs, one for each bucket of rows, and replayed.

Owns the buckets, the inputs at fixed places that a graph reads, and how a step's inputs get there. A step is filled up
to its bucket with rows that write to a scratch block of their own and attend to nothing else, so that no real row sees
them. What a graph cannot hold is done before it: clearing blocks, uploading. Graphs are captured while warming up
(``warm_up``) and never while requests are served; a step without a graph is computed as ever.

What a graph is, is ``graph_backend``'s business. A CPU has recordings in their place (``recorded_steps``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...comm.overlap import run_plain
from ...kernels.attention_items import DecodeItems
from ...kernels.attention_span import SPAN_KEYS
from ...kernels.backends import uses_triton_on
from ...kernels.kv_blocks import clear_blocks
from ..messages import Int32Array
from ..models.forward import ForwardBatch
from .graph_backend import CapturedPass, GraphBackend
from .step_batch import BatchBuilder, StepRows

MOST_ROWS = 512
"""Of a graph; with more, a step is so long that launching its kernels is hidden behind them."""

logger = logging.getLogger(__name__)


def bucket_sizes(most_rows: int) -> tuple[int, ...]:
    """Return the numbers of rows that there are graphs for: a step computes at most a half more rows than it has."""
    sizes = [1, 2, 4, 6, 8, 12, 16, 24, 32]
    while sizes[-1] < most_rows:
        sizes.append(sizes[-1] * 3 // 2 if sizes[-1] & (sizes[-1] - 1) == 0 else sizes[-1] * 4 // 3)
    most = min(most_rows, MOST_ROWS)
    return (*(size for size in sizes if size < most), most)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Graph:
    """A captured step: the batch that it reads, and where its result is."""

    batch: ForwardBatch
    captured: CapturedPass


class DecodeGraphs:
    """The graphs of a model that has one rank, with its cache. One thread at a time may use them."""

    def __init__(
        self,
        batches: BatchBuilder,
        backend: GraphBackend,
        *,
        scratch_block: int,
        most_rows: int,
        most_columns: int,
    ) -> None:
        """Capture nothing yet. ``scratch_block``: a block of the cache that no sequence is ever given; it is cleared.

        Units: most_rows, sequences at once; most_columns, blocks of the longest
        """
        model, cache = batches.model, batches.cache
        self._batches = batches
        self._model = model
        self._cache = cache
        self._backend = backend
        self._scratch_block = scratch_block
        self._sizes = bucket_sizes(most_rows)
        # A kernel is compiled anew for tables of a width that 16 does not divide.
        self._columns = -(-most_columns // 16) * 16
        self._graphs: dict[int, _Graph] = {}
        self._refused = False
        self.replays = 0
        """Steps that were run by a graph."""
        model.reserve_positions(self._columns * cache.block_size)
        clear_blocks(torch.tensor([scratch_block], device=model.device), cache.layers)

    @classmethod
    def where_possible(
        cls,
        batches: BatchBuilder,
        backend: GraphBackend | None,
        *,
        scratch_block: int,
        most_rows: int,
        most_columns: int,
    ) -> DecodeGraphs | None:
        """Return graphs for a model; None where the device has none, or where steps are not of one shape."""
        operation = "attention" if batches.model.spec.latent is None else "mla"
        if backend is None or not uses_triton_on(operation, batches.model.device):
            return None
        return cls(batches, backend, scratch_block=scratch_block, most_rows=most_rows, most_columns=most_columns)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the buckets that there are graphs for."""
        return tuple(sorted(self._graphs))

    @property
    def missing(self) -> tuple[int, ...]:
        """Return the buckets that are still to be captured, the largest first: others then fit its memory."""
        return () if self._refused else tuple(size for size in reversed(self._sizes) if size not in self._graphs)

    def room(self, size: int) -> int:
        """Return the spans of keys that a graph of a bucket has room for.

        Twice what the whole cache holds: prefixes that sequences share count for each of them.
        """
        longest = -(-self._columns * self._cache.block_size // SPAN_KEYS)
        whole_cache = -(-self._cache.num_blocks * self._cache.block_size // SPAN_KEYS)
        return min(size * longest, size + 2 * whole_cache)

    def take(self, rows: StepRows) -> bool:
        """Return whether a graph runs a step: each row has one token, and it has room for the keys."""
        if not self._graphs or not bool((rows.counts == 1).all()):
            return False
        size = self._size_for(len(rows.counts))
        return size is not None and self._spans(rows, size) <= self.room(size)

    def run(self, rows: StepRows) -> Tensor:
        """Return the hidden states of a step's tokens, valid until the next step."""
        size = self._size_for(len(rows.counts))
        assert size is not None, "a step is asked for before it is run"
        graph = self._graphs[size]
        fresh = self._batches.build(self._filled(rows, size), decode_room=self.room(size))
        if fresh.fresh_blocks_F.shape[0]:
            clear_blocks(fresh.fresh_blocks_F, self._cache.layers)
        _renew(graph.batch, fresh)
        graph.captured.replay()
        self.replays += 1
        return graph.captured.output[: len(rows.counts)]

    def prepare(self, size: int) -> None:
        """Run a bucket's pass as ever: what it needs is compiled, and may be measured."""
        run_plain(self._model.forward_parts(self._made_up(size), self._cache))

    def capture(self, size: int) -> bool:
        """Capture a bucket that was prepared; return whether it could be. If not, no other will be either."""
        if self._refused:
            return False
        batch = self._made_up(size)
        try:
            captured = self._backend.capture(lambda: run_plain(self._model.forward_parts(batch, self._cache)))
        except RuntimeError as error:
            logger.warning("decoding steps are not captured as graphs: %s", error)
            self._refused = True
            return False
        self._graphs[size] = _Graph(batch=batch, captured=captured)
        return True

    def _size_for(self, rows: int) -> int | None:
        return min((size for size in self._graphs if size >= rows), default=None)

    def _spans(self, rows: StepRows, size: int) -> int:
        # Rows of one token: at position p, keys up to p.
        return int((rows.starts // SPAN_KEYS + 1).sum()) + size - len(rows.counts)

    def _made_up(self, size: int) -> ForwardBatch:
        """Return a bucket's batch of nothing but rows that fill it, at places of its own that hold any step."""
        nothing = StepRows(
            token_ids_T=torch.zeros(0, dtype=torch.int64),
            starts=np.zeros(0, np.int32),
            counts=np.zeros(0, np.int32),
            prompt_lengths=np.zeros(0, np.int32),
            block_tables=np.zeros((0, 1), np.int32),
        )
        batch = self._batches.build(self._filled(nothing, size), decode_room=self.room(size))
        # The scratch block counts as entered; a graph clears nothing.
        batch = replace(batch, fresh_blocks_F=batch.fresh_blocks_F[:0], longest=self._columns * self._cache.block_size)
        attention = {
            window: _widened(plan, self._columns, self._scratch_block) for window, plan in batch.attention.items()
        }
        return replace(batch, attention=attention)

    def _filled(self, rows: StepRows, size: int) -> StepRows:
        """Fill a step up with rows at the first position of the scratch block."""
        missing = size - len(rows.counts)
        tables = np.full((size, rows.block_tables.shape[1]), self._scratch_block, np.int32)
        tables[: len(rows.counts)] = rows.block_tables
        return StepRows(
            token_ids_T=torch.cat((rows.token_ids_T, rows.token_ids_T.new_zeros(missing))),
            starts=_padded(rows.starts, missing, 0),
            counts=_padded(rows.counts, missing, 1),
            prompt_lengths=_padded(rows.prompt_lengths, missing, 1),
            block_tables=tables,
        )


def _padded(numbers: Int32Array, missing: int, number: int) -> Int32Array:
    return np.concatenate((numbers, np.full(missing, number, np.int32)))


def _widened(value: Any, columns: int, block: int) -> Any:
    """Return items with tables as wide as any step's, full of one block."""
    if isinstance(value, DecodeItems):
        rows = value.tables_RB.shape[0]
        return replace(value, tables_RB=value.tables_RB.new_full((rows, columns), block))
    if is_dataclass(value) and not isinstance(value, type):
        changed = {each.name: _widened(getattr(value, each.name), columns, block) for each in fields(value)}
        return replace(value, **changed)
    return value


def _renew(kept: ForwardBatch, fresh: ForwardBatch) -> None:
    """Bring a step's inputs to the places of those that a graph reads, in as few copies as may be."""
    by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for own, new in _pairs(kept, replace(fresh, fresh_blocks_F=kept.fresh_blocks_F)):
        if own.shape == new.shape:
            targets, sources = by_type.setdefault(own.dtype, ([], []))
            targets.append(own)
            sources.append(new)
        else:
            # Tables are as wide as a step needs them; what stands behind is never read.
            own[:, : new.shape[1]].copy_(new)
    for targets, sources in by_type.values():
        torch._foreach_copy_(targets, sources)


def _pairs(kept: object, fresh: object) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tensors of two values that are made alike, side by side."""
    if isinstance(kept, Tensor) and isinstance(fresh, Tensor):
        if kept is not fresh:
            yield kept, fresh
    elif is_dataclass(kept):
        for field in fields(kept):
            yield from _pairs(getattr(kept, field.name), getattr(fresh, field.name))
    elif isinstance(kept, Mapping) and isinstance(fresh, Mapping):
        for key, value in kept.items():
            yield from _pairs(value, fresh[key])
