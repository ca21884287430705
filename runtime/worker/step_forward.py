"""Runs a step's tokens through a rank's layers: at once, or in parts that hide one another's wire time.

Owns the batches, the choice between the ways, and what is measured of the wire. The parts are cut at a token, wherever
that is in a row; all run the same layers (``comm.overlap``), each a layer's attention ahead of the next, which so finds
its keys. Of a step that is divided over sequence-parallel ranks, this rank's tokens run at once: its exchanges hide
behind its own attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...comm.overlap import Parts, run_interleaved, run_plain
from ...comm.overlap_meter import OverlapMeter
from ...comm.overlap_split import Cuts, cut_rows
from ...comm.sequence_split import StepDivision
from ..models.decoder import Decoder, LayerDone
from ..models.forward import ForwardBatch, build_divided_batch
from ..models.kv_cache import KvCache
from .graphs import DecodeGraphs
from .recorded_steps import RecordedSteps
from .step_batch import BatchBuilder, StepRows
from .token_split import TokenSplit


class StepForward:
    """A rank's layers with its cache.

    ``split`` says where steps are cut; without it they are not. From ``shares_from`` tokens on, a step or its part
    keeps the residual in shares; None: never. ``meter``: of the wire, and ``ring_meter`` of it in divided steps; None
    where nobody else is there, or on a GPU. ``recorded``, ``graphs``: of a rank that is alone, None without.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KvCache,
        *,
        block_size: int,
        deterministic: bool,
        split: TokenSplit | None = None,
        shares_from: int | None = None,
        meter: OverlapMeter | None = None,
        ring_meter: OverlapMeter | None = None,
        recorded: RecordedSteps | None = None,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._block_size = block_size
        self._deterministic = deterministic
        self._split = split
        self._shares_from = shares_from
        self._meter = meter
        self._ring_meter = ring_meter
        self._recorded = recorded
        self._graphs = graphs
        self._batches = BatchBuilder(model=model, cache=cache, deterministic=deterministic)
        self._hidden_before_s = 0.0
        self._wire_before_s = 0.0

    @property
    def graphs(self) -> DecodeGraphs | None:
        """The graphs that decoding steps are run by; None without any."""
        return self._graphs

    def run(self, rows: StepRows, hidden_TH: Tensor | None = None, *, layer_done: LayerDone | None = None) -> Tensor:
        """Return the hidden states of all tokens; ``hidden_TH`` comes from the stage before.

        ``layer_done`` is told of each layer once all tokens have passed its attention; a step that is recorded or
        a graph, over in a moment, tells nothing.

        Shapes: hidden_TH, and what is returned, [tokens, hidden size]
        """
        if self._graphs is not None and self._graphs.take(rows):
            return self._graphs.run(rows)
        if self._recorded is not None and self._recorded.take(rows.counts):
            return self._recorded.run(self._batches.build(rows))
        cuts = None if self._split is None else self._split.cut(rows.token_ids_T.shape[0])
        return self.run_cut(rows, hidden_TH, cuts, self._meter, layer_done)

    def run_divided(self, rows: StepRows, hidden_TH: Tensor | None, division: StepDivision) -> Tensor:
        """Return the hidden states of this rank's tokens of a divided step; ``rows`` is all of the step.

        Shapes: hidden_TH, and what is returned, [tokens of this rank, hidden size]
        """
        batch = build_divided_batch(
            division,
            token_ids=rows.token_ids_T,
            prompt_lengths=rows.prompt_lengths,
            block_tables=rows.block_tables,
            block_size=self._block_size,
            spec=self._model.spec,
            deterministic=self._deterministic,
            dtype=self._model.dtype,
            device=self._model.device,
        )
        return run_plain(self._through(batch, hidden_TH), meter=self._ring_meter)

    def run_cut(
        self,
        rows: StepRows,
        hidden_TH: Tensor | None,
        cuts: Cuts | None,
        meter: OverlapMeter | None,
        layer_done: LayerDone | None = None,
    ) -> Tensor:
        """As ``run``, with the tokens cut after so many of them, or not at all."""
        if cuts is None:
            return run_plain(self._parts(rows, hidden_TH, layer_done), meter=meter)
        pieces = cut_rows(rows.counts.tolist(), cuts)
        parts = []
        for begin, end, part in zip((0, *cuts), (*cuts, None), pieces, strict=True):
            tokens = slice(begin, end)
            part_rows = _part_of(rows, [(piece.row, piece.first, piece.tokens) for piece in part], tokens)
            # The last part is behind the others in every layer, so what it has passed they all have.
            told = layer_done if end is None else None
            parts.append(self._parts(part_rows, None if hidden_TH is None else hidden_TH[tokens], told))
        return torch.cat(run_interleaved(parts, meter=meter))

    def take_wire_s(self) -> tuple[float, float]:
        """Return what the passes since the last call spent on the wire, and how much of it was hidden, in seconds."""
        totals = [meter.totals for meter in (self._meter, self._ring_meter) if meter is not None]
        wire_s = sum(each.wire_s for each in totals)
        # Estimates may take hidden time back; what has been said stays said.
        hidden_s = max(sum(each.hidden_s for each in totals), self._hidden_before_s)
        taken = wire_s - self._wire_before_s, hidden_s - self._hidden_before_s
        self._wire_before_s, self._hidden_before_s = wire_s, hidden_s
        return taken

    def _parts(self, rows: StepRows, hidden_TH: Tensor | None, layer_done: LayerDone | None = None) -> Parts:
        return self._through(self._batches.build(rows), hidden_TH, layer_done)

    def _through(self, batch: ForwardBatch, hidden_TH: Tensor | None, layer_done: LayerDone | None = None) -> Parts:
        in_shares = self._shares_from is not None and batch.token_ids_T.shape[0] >= self._shares_from
        return self._model.forward_parts(batch, self._cache, hidden_TH, sharded_norm=in_shares, layer_done=layer_done)


def _part_of(rows: StepRows, pieces: Sequence[tuple[int, int, int]], tokens: slice) -> StepRows:
    """Return the rows of a part; ``pieces`` are (row, first token of the row, tokens)."""
    row, first, count = np.array(pieces, dtype=np.int32).T
    return StepRows(
        token_ids_T=rows.token_ids_T[tokens],
        starts=rows.starts[row] + first,
        counts=count,
        prompt_lengths=rows.prompt_lengths[row],
        block_tables=rows.block_tables[row],
    )
