"""Attention of rows with one query over the paged cache, all rows of about equal length at once.

What is the same for all layers of a step is made once, ``prepare_decode``: which rows of the cache to gather, the
masks, and views of the workspace. A layer is then a handful of operations: with small batches, what an operation costs
besides its arithmetic is most of the time. Nothing is shared between rows, so a row gives the same whatever the batch.

Shapes: T tokens, R rows, C items, S spans of a row, N query heads, K KV heads, G query heads per KV head, M = G
padded to whole ``QUERY_UNIT``s, P = C * K, D head size, L keys, X rows of the cache; a layer's cache is [2, num_blocks,
K, block_size, D], or [1, ...] of keys that are values too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from ..attention_span import AttentionOptions
from .attention_decode_plan import DecodePlan, SpanGroup, SplitRows
from .attention_products import QUERY_UNIT, attend_span, attend_whole, cap_scores_, merge_spans
from .attention_workspace import GATHER_BYTES, AttentionWorkspace


@dataclass(frozen=True, slots=True, kw_only=True)
class _Launch:
    """Items computed at once, and where. The buffers are shared by all launches: valid until the next one.

    Shapes: tokens_C [items], None if they are all tokens of the batch in order; rows_X [keys' and values' rows of the
    cache] int64, gathered_XE [those, block size * head size]; keys_PDL, values_PLD views of it; mask_PML None if every
    key is seen; own_queries_CKGD, own_results_CKGD views of queries_PMD and results_PMD without what fills up
    """

    tokens_C: Tensor | None
    rows_X: Tensor
    gathered_XE: Tensor
    keys_PDL: Tensor
    values_PLD: Tensor
    mask_PML: Tensor | None
    queries_PMD: Tensor
    own_queries_CKGD: Tensor
    scores_PML: Tensor
    weights_PML: Tensor
    results_PMD: Tensor
    own_results_CKGD: Tensor

    def score(self, q_TKGD: Tensor, cache_XE: Tensor, options: AttentionOptions) -> None:
        """Compute masked scores, and gather the values."""
        self.own_queries_CKGD.copy_(q_TKGD if self.tokens_C is None else q_TKGD.index_select(0, self.tokens_C))
        torch.index_select(cache_XE, 0, self.rows_X, out=self.gathered_XE)
        # What is capped has its mask added later.
        late_mask_PML = None if options.soft_cap is None else self.mask_PML
        base_PML, beta = self.scores_PML, 0
        if self.mask_PML is not None and late_mask_PML is None:
            base_PML, beta = self.mask_PML, 1
        # With beta=0, what the buffer held does not count.
        torch.baddbmm(base_PML, self.queries_PMD, self.keys_PDL, beta=beta, alpha=options.scale, out=self.scores_PML)
        cap_scores_(self.scores_PML, options)
        if late_mask_PML is not None:
            self.scores_PML.add_(late_mask_PML)

    def attend(self, sinks_KM: Tensor | None) -> None:
        """Compute the results of items that see no other keys. Shapes: sinks_KM [KV heads, padded group] float32"""
        items = self.own_results_CKGD.shape[0]
        attend_whole(
            self.scores_PML,
            self.values_PLD,
            sinks_PM=None if sinks_KM is None else sinks_KM.repeat(items, 1),
            weights_PML=self.weights_PML,
            result_PMD=self.results_PMD,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _PreparedSplit:
    """Rows whose spans are merged: launches with the places of their items, and what merging takes.

    Shapes: results_CKMD of all items; peaks_2CX [2, items, K * M] float32
    """

    launches: tuple[tuple[_Launch, slice], ...]
    rows: SplitRows
    results_CKMD: Tensor
    peaks_2CX: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedDecode:
    """The rows of one token, ready for any layer."""

    direct: tuple[_Launch, ...]
    split: _PreparedSplit | None


def prepare_decode(
    plan: DecodePlan, layer_cache: Tensor, *, tokens: int, heads: int, workspace: AttentionWorkspace
) -> PreparedDecode:
    """Make what the layers of a step have in common, for a batch of ``tokens`` with ``heads`` query heads.

    Valid until the workspace is prepared again. ``layer_cache``: any layer's.
    """
    direct = tuple(
        _prepare(group, part, layer_cache, tokens=tokens, heads=heads, workspace=workspace)
        for group in plan.direct
        for part in _parts(group, layer_cache)
    )
    if plan.split is None:
        return PreparedDecode(direct=direct, split=None)
    launches, done = [], 0
    for group in plan.split.groups:
        for part in _parts(group, layer_cache):
            launch = _prepare(group, part, layer_cache, tokens=tokens, heads=heads, workspace=workspace)
            launches.append((launch, slice(done, done + part.stop - part.start)))
            done = launches[-1][1].stop
    kv_heads, head_size = layer_cache.shape[2], layer_cache.shape[4]
    queries = _padded_queries(heads // kv_heads)
    split = _PreparedSplit(
        launches=tuple(launches),
        rows=plan.split,
        results_CKMD=workspace.take("span results", (done, kv_heads, queries, head_size)),
        peaks_2CX=torch.empty((2, done, kv_heads * queries), dtype=torch.float32, device=layer_cache.device),
    )
    return PreparedDecode(direct=direct, split=split)


def attend_decode(
    q_TKGD: Tensor, layer_cache: Tensor, prepared: PreparedDecode, options: AttentionOptions, *, out_TKGD: Tensor
) -> None:
    """Compute the attention of the prepared rows into their places in ``out_TKGD``.

    Shapes: q_TKGD, out_TKGD [tokens, KV heads, group, head size]; layer_cache [2, blocks, KV heads, block size,
    head size] contiguous; all of the workspace's type
    """
    cache_XE = layer_cache.view(-1, layer_cache.shape[3] * layer_cache.shape[4])
    sinks_KM = _padded_sinks(options, q_TKGD)
    for launch in prepared.direct:
        launch.score(q_TKGD, cache_XE, options)
        launch.attend(sinks_KM)
        if launch.tokens_C is None:
            out_TKGD.copy_(launch.own_results_CKGD)
        else:
            out_TKGD.index_copy_(0, launch.tokens_C, launch.own_results_CKGD)
    if prepared.split is not None:
        merged_RKMD = _attend_split(q_TKGD, cache_XE, prepared.split, options, sinks_KM)
        own_RKGD = merged_RKMD[:, :, : out_TKGD.shape[2]].to(out_TKGD.dtype)
        out_TKGD.index_copy_(0, prepared.split.rows.tokens_R, own_RKGD)


def _attend_split(
    q_TKGD: Tensor, cache_XE: Tensor, split: _PreparedSplit, options: AttentionOptions, sinks_KM: Tensor | None
) -> Tensor:
    """Return the merged results of the rows, float32 [rows, KV heads, padded group, head size]."""
    _, kv_heads, queries, head_size = split.results_CKMD.shape
    for launch, here in split.launches:
        launch.score(q_TKGD, cache_XE, options)
        attend_span(
            launch.scores_PML,
            launch.values_PLD,
            result_PMD=split.results_CKMD[here].view(-1, queries, head_size),
            peaks_2PM=split.peaks_2CX[:, here].view(2, -1, queries),
        )
    rows, most_spans = split.rows.items_RS.shape
    chosen = split.rows.items_RS.view(-1)
    peaks_2RSX = split.peaks_2CX.index_select(1, chosen).view(2, rows, most_spans, -1)
    results_RSXD = split.results_CKMD.index_select(0, chosen).view(rows, most_spans, -1, head_size)
    sinks_RX = None if sinks_KM is None else sinks_KM.view(1, -1).expand(rows, -1)
    merged_RXD = merge_spans(results_RSXD, peaks_2RSX[0] + split.rows.absent_RS1, peaks_2RSX[1], sinks_RX)
    return merged_RXD.view(rows, kv_heads, queries, head_size)


def _padded_sinks(options: AttentionOptions, q_TKGD: Tensor) -> Tensor | None:
    """Return the sinks of each KV head's queries, [KV heads, padded group], with anything for those that fill up."""
    if options.sinks_N is None:
        return None
    _, kv_heads, group, _ = q_TKGD.shape
    return functional.pad(options.sinks_N.view(kv_heads, group), (0, _padded_queries(group) - group))


def _padded_queries(group: int) -> int:
    return QUERY_UNIT * -(-group // QUERY_UNIT)


def _parts(group: SpanGroup, layer_cache: Tensor) -> list[slice]:
    """Cut a group so that what is gathered at once stays in cache."""
    items = group.tokens_C.shape[0]
    item_bytes = 2 * group.gather_CKB[0].numel() * layer_cache[0, 0, 0].nbytes
    at_once = max(1, GATHER_BYTES // item_bytes)
    return [slice(first, min(items, first + at_once)) for first in range(0, items, at_once)]


def _prepare(
    group: SpanGroup, part: slice, layer_cache: Tensor, *, tokens: int, heads: int, workspace: AttentionWorkspace
) -> _Launch:
    parts, num_blocks, kv_heads, block_size, head_size = layer_cache.shape
    items, keys = part.stop - part.start, group.keys
    pairs, own, queries = items * kv_heads, heads // kv_heads, _padded_queries(heads // kv_heads)
    key_rows = group.gather_CKB[part].view(-1)
    rows_X = torch.cat((key_rows, key_rows + (parts - 1) * num_blocks * kv_heads))
    # Queries that only fill up may hold anything: rows of a product do not touch one another.
    queries_CKMD = workspace.take("queries", (items, kv_heads, queries, head_size))
    gathered_XE = workspace.take("keys and values", (rows_X.shape[0], block_size * head_size))
    keys_PLD, values_PLD = gathered_XE.view(2, pairs, keys, head_size).unbind()
    results_CKMD = workspace.take("results", (items, kv_heads, queries, head_size))
    mask_PML = None
    if group.mask_C11L is not None:
        mask_CKML = group.mask_C11L[part].expand(items, kv_heads, queries, keys)
        mask_PML = mask_CKML.reshape(pairs, queries, keys)
    return _Launch(
        tokens_C=None if group.in_order and items == tokens else group.tokens_C[part],
        rows_X=rows_X,
        gathered_XE=gathered_XE,
        keys_PDL=keys_PLD.transpose(1, 2),
        values_PLD=values_PLD,
        mask_PML=mask_PML,
        queries_PMD=queries_CKMD.view(pairs, queries, head_size),
        own_queries_CKGD=queries_CKMD[:, :, :own],
        scores_PML=workspace.take("scores", (pairs, queries, keys)),
        weights_PML=workspace.take("weights", (pairs, queries, keys)),
        results_PMD=results_CKMD.view(pairs, queries, head_size),
        own_results_CKGD=results_CKMD[:, :, :own],
    )
