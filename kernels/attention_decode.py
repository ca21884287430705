"""Attention of rows with one query over the paged cache, all rows of about equal length at once.

Nothing is shared between rows, so a row gives the same whatever the batch.

Shapes: T tokens, R rows, C items, S spans of a row, N query heads, K KV heads, G query heads per KV head, M = G
padded to whole ``QUERY_UNIT``s, P = C * K, D head size; a layer's cache is [2, num_blocks, K, block_size, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_decode_plan import DecodePlan, SpanGroup, SplitRows
from .attention_products import (
    QUERY_UNIT,
    attend_span,
    attend_whole,
    gather_keys_values,
    merge_spans,
    scaled_scores,
)
from .attention_workspace import GATHER_BYTES, AttentionWorkspace


def attend_decode(
    q_TKGD: Tensor,
    layer_cache: Tensor,
    plan: DecodePlan,
    *,
    scale: float,
    workspace: AttentionWorkspace,
    out_TKGD: Tensor,
) -> None:
    """Compute the attention of the plan's rows into their places in ``out_TKGD``.

    Shapes: q_TKGD, out_TKGD [tokens, KV heads, group, head size]; layer_cache [2, blocks, KV heads, block size,
    head size] contiguous; all of the workspace's type
    """
    for group in plan.direct:
        for part in _parts(group, layer_cache):
            scores_PML, values_PLD = _scores(q_TKGD, layer_cache, group, part, scale=scale, workspace=workspace)
            result_PMD = attend_whole(scores_PML, values_PLD, workspace=workspace)
            _put(result_PMD, group.tokens_C[part], out_TKGD)
    if plan.split is not None:
        merged_RMD = _split_results(q_TKGD, layer_cache, plan.split, scale=scale, workspace=workspace)
        _put(merged_RMD.to(out_TKGD.dtype), plan.split.tokens_R, out_TKGD)


def _parts(group: SpanGroup, layer_cache: Tensor) -> list[slice]:
    """Cut a group so that what is gathered at once stays in cache."""
    items = group.tokens_C.shape[0]
    item_bytes = 2 * group.gather_CKB[0].numel() * layer_cache[0, 0, 0].nbytes
    at_once = max(1, GATHER_BYTES // item_bytes)
    return [slice(first, min(items, first + at_once)) for first in range(0, items, at_once)]


def _scores(
    q_TKGD: Tensor,
    layer_cache: Tensor,
    group: SpanGroup,
    part: slice,
    *,
    scale: float,
    workspace: AttentionWorkspace,
) -> tuple[Tensor, Tensor]:
    """Return masked scores and the values of a group's items."""
    _, kv_heads, heads, head_size = q_TKGD.shape
    tokens_C, mask_C11L = group.tokens_C[part], group.mask_C11L[part]
    queries, keys = QUERY_UNIT * -(-heads // QUERY_UNIT), mask_C11L.shape[-1]
    q_CKMD = workspace.take("queries", (tokens_C.shape[0], kv_heads, queries, head_size))
    # The queries that only fill up may hold anything: rows of a product do not touch one another.
    q_CKMD[:, :, :heads] = q_TKGD.index_select(0, tokens_C)
    rows = group.gather_CKB[part].view(-1)
    keys_PLD, values_PLD = gather_keys_values(layer_cache, rows, keys=keys, workspace=workspace)
    scores_PML = scaled_scores(q_CKMD.view(-1, queries, head_size), keys_PLD, scale=scale, workspace=workspace)
    scores_PML.view(-1, kv_heads, queries, keys).add_(mask_C11L)
    return scores_PML, values_PLD


def _put(result_PMD: Tensor, tokens: Tensor, out_TKGD: Tensor) -> None:
    _, kv_heads, heads, head_size = out_TKGD.shape
    result = result_PMD.view(tokens.shape[0], kv_heads, -1, head_size)
    out_TKGD.index_copy_(0, tokens, result[:, :, :heads])


def _split_results(
    q_TKGD: Tensor, layer_cache: Tensor, split: SplitRows, *, scale: float, workspace: AttentionWorkspace
) -> Tensor:
    _, kv_heads, heads, head_size = q_TKGD.shape
    queries = QUERY_UNIT * -(-heads // QUERY_UNIT)
    items = sum(group.tokens_C.shape[0] for group in split.groups)
    results_CKMD = workspace.take("span results", (items, kv_heads, queries, head_size))
    peaks_2CX = torch.empty((2, items, kv_heads * queries), dtype=torch.float32, device=q_TKGD.device)
    done = 0
    for group in split.groups:
        for part in _parts(group, layer_cache):
            scores_PML, values_PLD = _scores(q_TKGD, layer_cache, group, part, scale=scale, workspace=workspace)
            here = slice(done, done + scores_PML.shape[0] // kv_heads)
            attend_span(
                scores_PML,
                values_PLD,
                result_PMD=results_CKMD[here].view(-1, queries, head_size),
                peaks_2PM=peaks_2CX[:, here].view(2, -1, queries),
            )
            done = here.stop
    rows, most_spans = split.items_RS.shape
    chosen = split.items_RS.view(-1)
    peaks_2RSX = peaks_2CX.index_select(1, chosen).view(2, rows, most_spans, -1)
    results_RSXD = results_CKMD.index_select(0, chosen).view(rows, most_spans, -1, head_size)
    return merge_spans(results_RSXD, peaks_2RSX[0] + split.absent_RS1, peaks_2RSX[1])
