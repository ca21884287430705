"""Attention of rows with several queries over the paged cache: rows of equal tiles side by side, tile by tile.

The keys and values of as many rows (or, of one row, as many KV heads) as fit the workspace's share are gathered
once a layer; each tile then multiplies with the range of keys that it sees. The query heads of a KV head are
rows of one product.

Shapes: T tokens, R rows at work, K KV heads, G query heads per KV head, Q queries of a tile, P = R * K, M = G *
Q, L keys, D head size; a layer's cache is [2, num_blocks, K, block_size, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention_span import AttentionOptions
from .attention_prefill_plan import PrefillGroup, PrefillTile
from .attention_products import attend_span, attend_whole, gather_keys_values, merge_spans, scaled_scores
from .attention_workspace import GATHER_BYTES, AttentionWorkspace


def attend_prefill(
    q_TKGD: Tensor,
    layer_cache: Tensor,
    group: PrefillGroup,
    options: AttentionOptions,
    *,
    workspace: AttentionWorkspace,
    out_TKGD: Tensor,
) -> None:
    """Compute the attention of one group of rows into their places in ``out_TKGD``.

    Shapes: q_TKGD, out_TKGD [tokens, KV heads, group, head size]; layer_cache [2, blocks, KV heads, block size,
    head size] contiguous; all of the workspace's type
    """
    rows, _, blocks = group.gather_RKB.shape
    block_size = layer_cache.shape[3]
    sinks_KG = None if options.sinks_N is None else options.sinks_N.view(q_TKGD.shape[1:3])
    for some_rows, heads in gather_parts(group, layer_cache, q_TKGD.shape[2]):
        gathered = group.gather_RKB[some_rows, heads].reshape(-1)
        keys_PLD, values_PLD = gather_keys_values(layer_cache, gathered, keys=blocks * block_size, workspace=workspace)
        for tile in group.tiles:
            q_RKGQD = load_queries(q_TKGD[:, heads], tile, some_rows, rows=rows, workspace=workspace)
            mask_R11QW = tile.mask_R11QW[some_rows]
            result_RKGQD = _attend_tile(
                q_RKGQD,
                keys_PLD,
                values_PLD,
                tile,
                options,
                mask_R11QW=mask_R11QW,
                sinks_KG=None if sinks_KG is None else sinks_KG[heads],
                workspace=workspace,
            )
            _store(result_RKGQD, tile, some_rows, rows=rows, out_TKGD=out_TKGD[:, heads])


def load_queries(
    q_TKGD: Tensor, tile: PrefillTile, some_rows: slice, *, rows: int, workspace: AttentionWorkspace
) -> Tensor:
    """Return the tile's queries, [rows, KV heads, group, queries, head size]."""
    if tile.place is not None:
        q_1KGQD = workspace.take("queries", (1, *q_TKGD.shape[1:3], tile.queries, q_TKGD.shape[3]))
        # The queries that only fill up may hold anything: rows of a product do not touch one another.
        q_1KGQD[0, :, :, : tile.place.stop - tile.place.start] = q_TKGD[tile.place].permute(1, 2, 0, 3)
        return q_1KGQD
    tokens_RQ = tile.tokens_RQ.view(rows, -1)[some_rows]
    q_RQKGD = q_TKGD.index_select(0, tokens_RQ.reshape(-1)).unflatten(0, tokens_RQ.shape)
    q_RKGQD = q_RQKGD.permute(0, 2, 3, 1, 4)
    return workspace.take("queries", q_RKGQD.shape).copy_(q_RKGQD)


def _store(result_RKGQD: Tensor, tile: PrefillTile, some_rows: slice, *, rows: int, out_TKGD: Tensor) -> None:
    if tile.place is not None:
        count = tile.place.stop - tile.place.start
        out_TKGD[tile.place] = result_RKGQD[0, :, :, :count].permute(2, 0, 1, 3)
        return
    tokens = tile.tokens_RQ.view(rows, -1)[some_rows].reshape(-1)
    # Queries that only fill up repeat the row's last one: they write what it writes.
    result_XKGD = result_RKGQD.permute(0, 3, 1, 2, 4).flatten(0, 1)
    out_TKGD.index_copy_(0, tokens, result_XKGD.to(out_TKGD.dtype))


def gather_parts(group: PrefillGroup, layer_cache: Tensor, heads_per_kv: int) -> list[tuple[slice, slice]]:
    """Cut a group into (rows, KV heads) so that neither what is gathered nor the scores leave the cache."""
    rows, kv_heads, blocks = group.gather_RKB.shape
    block_bytes = layer_cache[0, 0, 0].nbytes
    keys = blocks * layer_cache.shape[3]
    queries = max(tile.queries for tile in group.tiles) * heads_per_kv
    head_bytes = max(2 * blocks * block_bytes, queries * keys * layer_cache.element_size())
    rows_at_once = max(1, GATHER_BYTES // (head_bytes * kv_heads))
    heads_at_once = max(1, min(kv_heads, GATHER_BYTES // (2 * blocks * block_bytes)))
    if rows_at_once > 1:
        heads_at_once = kv_heads
    return [
        (slice(row, min(rows, row + rows_at_once)), slice(head, min(kv_heads, head + heads_at_once)))
        for row in range(0, rows, rows_at_once)
        for head in range(0, kv_heads, heads_at_once)
    ]


def tile_scores(
    q_RKGQD: Tensor,
    keys_PLD: Tensor,
    tile: PrefillTile,
    options: AttentionOptions,
    first: int,
    last: int,
    *,
    mask_R11QW: Tensor,
    workspace: AttentionWorkspace,
) -> Tensor:
    """Return a tile's masked scores of the columns ``first`` to ``last``, [P, M, those]; valid until the next call."""
    rows, kv_heads, group, queries, head_size = q_RKGQD.shape
    q_PMD = q_RKGQD.view(rows * kv_heads, group * queries, head_size)
    scores_PML = scaled_scores(q_PMD, keys_PLD[:, first:last], options, workspace=workspace)
    if last > tile.edge:
        start = max(first, tile.edge)
        edge = scores_PML.view(rows, kv_heads, group, queries, -1)[..., start - first :]
        edge.add_(mask_R11QW[..., start - tile.edge : last - tile.edge])
    return scores_PML


def _attend_tile(
    q_RKGQD: Tensor,
    keys_PLD: Tensor,
    values_PLD: Tensor,
    tile: PrefillTile,
    options: AttentionOptions,
    *,
    mask_R11QW: Tensor,
    sinks_KG: Tensor | None,
    workspace: AttentionWorkspace,
) -> Tensor:
    """Return [rows, KV heads, group, queries, head size]; valid until the next call."""
    q_PMD = q_RKGQD.flatten(0, 1).flatten(1, 2)
    sinks_PM = None
    if sinks_KG is not None:
        sinks_PM = sinks_KG[None, ..., None].expand(q_RKGQD.shape[:4]).reshape(q_PMD.shape[:2])

    def scores_of(first: int, last: int) -> Tensor:
        return tile_scores(q_RKGQD, keys_PLD, tile, options, first, last, mask_R11QW=mask_R11QW, workspace=workspace)

    if len(tile.ranges) == 1:
        first, last = tile.ranges[0]
        scores_PML, result_PMD = scores_of(first, last), workspace.take("results", q_PMD.shape)
        weights_PML = workspace.take("weights", scores_PML.shape)
        attend_whole(
            scores_PML, values_PLD[:, first:last], sinks_PM=sinks_PM, weights_PML=weights_PML, result_PMD=result_PMD
        )
        return result_PMD.view_as(q_RKGQD)
    results_SPMD = workspace.take("span results", (len(tile.ranges), *q_PMD.shape))
    peaks_2SPM = torch.empty((2, *results_SPMD.shape[:3]), dtype=torch.float32, device=q_PMD.device)
    for place, (first, last) in enumerate(tile.ranges):
        attend_span(
            scores_of(first, last),
            values_PLD[:, first:last],
            result_PMD=results_SPMD[place],
            peaks_2PM=peaks_2SPM[:, place],
        )
    maxima_PSM, peak_weights_PSM = peaks_2SPM.transpose(1, 2)
    merged_PMD = merge_spans(results_SPMD.transpose(0, 1), maxima_PSM, peak_weights_PSM, sinks_PM)
    return merged_PMD.view(q_RKGQD.shape)
