"""Attention of rows with one query over the paged cache, all rows at once.

Each chunk of keys gives a partial result (its largest score, its sum of exponentials, its weighted values);
the partial results of a row are added up. Nothing is shared between rows, so a row gives the same whatever
the batch.

Shapes: T tokens, R rows, C chunks, N query heads, K KV heads, G query heads per KV head, L keys of a chunk, D
head size; a layer's cache is [2, num_blocks, K, block_size, D].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_plan import DecodePlan
from .attention_workspace import GATHER_BYTES, AttentionWorkspace


@dataclass(frozen=True, slots=True, kw_only=True)
class _Partials:
    """Shapes: values_CKGD [chunks, KV heads, group, head size]; maxima_CKG1, sums_CKG1 [chunks, KV heads,
    group, 1] float32: the largest score, and the sum of exponentials relative to it.
    """

    values_CKGD: Tensor
    maxima_CKG1: Tensor
    sums_CKG1: Tensor


def attend_decode(
    q_TND: Tensor,
    layer_cache: Tensor,
    plan: DecodePlan,
    *,
    scale: float,
    workspace: AttentionWorkspace,
    out_TND: Tensor,
) -> None:
    """Compute the attention of the plan's rows into their places in ``out_TND``.

    Shapes: q_TND, out_TND [tokens, heads, head size]; layer_cache [2, blocks, KV heads, block size, head
    size] contiguous; all of the workspace's type
    Source: Flash-Decoding (Dao et al., 2023): keys split into chunks, combined by their log-sum-exp
    """
    kv_heads, head_size = layer_cache.shape[2], layer_cache.shape[4]
    num_rows = plan.tokens_R.shape[0]
    q_RKGD = q_TND.index_select(0, plan.tokens_R).view(num_rows, kv_heads, -1, head_size)
    parts = _partial_results(q_RKGD, layer_cache, plan, scale=scale, workspace=workspace)
    out_RND = _combine(parts, plan).to(q_TND.dtype).view(num_rows, -1, head_size)
    out_TND.index_copy_(0, plan.tokens_R, out_RND)


def _partial_results(
    q_RKGD: Tensor, layer_cache: Tensor, plan: DecodePlan, *, scale: float, workspace: AttentionWorkspace
) -> _Partials:
    _, kv_heads, group, head_size = q_RKGD.shape
    chunks, keys = plan.mask_CL.shape
    q_CKGD = q_RKGD.index_select(0, plan.chunk_rows_C)
    parts = _Partials(
        values_CKGD=q_RKGD.new_empty((chunks, kv_heads, group, head_size)),
        maxima_CKG1=plan.mask_CL.new_empty((chunks, kv_heads, group, 1)),
        sums_CKG1=plan.mask_CL.new_empty((chunks, kv_heads, group, 1)),
    )
    chunk_bytes = 2 * kv_heads * keys * head_size * q_RKGD.element_size()
    at_once = max(1, GATHER_BYTES // chunk_bytes)
    for first in range(0, chunks, at_once):
        last = min(chunks, first + at_once)
        keys_PLD, values_PLD = _gather(layer_cache, plan.gather_CKB[first:last], keys=keys, workspace=workspace)
        scores_PGL = torch.bmm(q_CKGD[first:last].view(-1, group, head_size), keys_PLD.transpose(1, 2))
        # Adding the float32 mask casts the scores in the same pass.
        scores_CKGL = torch.add(
            plan.mask_CL[first:last, None, None], scores_PGL.view(-1, kv_heads, group, keys), alpha=scale
        )
        maxima_CKG1 = parts.maxima_CKG1[first:last]
        torch.amax(scores_CKGL, -1, keepdim=True, out=maxima_CKG1)
        scores_CKGL.sub_(maxima_CKG1).exp_()
        torch.sum(scores_CKGL, -1, keepdim=True, out=parts.sums_CKG1[first:last])
        weights_PGL = scores_CKGL.to(q_RKGD.dtype).view(-1, group, keys)
        torch.bmm(weights_PGL, values_PLD, out=parts.values_CKGD[first:last].view(-1, group, head_size))
    return parts


def _gather(
    layer_cache: Tensor, gather_CKB: Tensor, *, keys: int, workspace: AttentionWorkspace
) -> tuple[Tensor, Tensor]:
    # P stands for (chunk, KV head) pairs: the keys of one head of one chunk lie side by side.
    block_size, head_size = layer_cache.shape[3:]
    rows = gather_CKB.reshape(-1)
    keys_out = workspace.take("decode keys", (rows.shape[0], block_size * head_size))
    values_out = workspace.take("decode values", (rows.shape[0], block_size * head_size))
    torch.index_select(layer_cache[0].view(-1, block_size * head_size), 0, rows, out=keys_out)
    torch.index_select(layer_cache[1].view(-1, block_size * head_size), 0, rows, out=values_out)
    return keys_out.view(-1, keys, head_size), values_out.view(-1, keys, head_size)


def _combine(parts: _Partials, plan: DecodePlan) -> Tensor:
    if plan.one_chunk_each:
        return parts.values_CKGD / parts.sums_CKG1
    num_rows = plan.tokens_R.shape[0]
    rows = plan.chunk_rows_C
    shape = (num_rows, *parts.maxima_CKG1.shape[1:])
    largest_RKG1 = parts.maxima_CKG1.new_full(shape, float("-inf"))
    largest_RKG1.scatter_reduce_(0, rows.view(-1, 1, 1, 1).expand_as(parts.maxima_CKG1), parts.maxima_CKG1, "amax")
    shares_CKG1 = torch.exp(parts.maxima_CKG1 - largest_RKG1.index_select(0, rows))
    values_RKGD = shares_CKG1.new_zeros((*shape[:-1], parts.values_CKGD.shape[-1]))
    values_RKGD.index_add_(0, rows, parts.values_CKGD * shares_CKG1)
    sums_RKG1 = shares_CKG1.new_zeros(shape).index_add_(0, rows, parts.sums_CKG1 * shares_CKG1)
    return values_RKGD / sums_RKG1
