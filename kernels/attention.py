"""Attention over the paged cache: the one entry for a batch of rows of any kind.

Shapes: T tokens, N query heads, K KV heads, D head size; a layer's cache is [2, num_blocks, K, block_size, D].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_decode import decode_attention
from .attention_items import DecodeItems, PrefillItems
from .attention_plan import AttentionPlan
from .attention_prefill import prefill_attention
from .attention_span import AttentionOptions
from .cpu.attention_decode import PreparedDecode, attend_decode, prepare_decode
from .cpu.attention_paged import PagedRows, PreparedPaged, attend_paged, prepare_paged
from .cpu.attention_paged_prefill import PagedRuns, PreparedRuns, attend_paged_runs, prepare_paged_runs
from .cpu.attention_prefill import attend_prefill
from .cpu.attention_prefill_plan import PrefillGroup
from .cpu.attention_workspace import AttentionWorkspace
from .shared_items import SharedItems
from .shared_prefix import shared_decode_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedAttention:
    """The attention of one step, ready for each layer of one window."""

    window: int | None
    decode: PreparedDecode | PreparedPaged | DecodeItems | SharedItems | None
    prefill: tuple[PrefillGroup, ...] | PreparedRuns | PrefillItems
    workspace: AttentionWorkspace


def prepare_attention(
    plan: AttentionPlan, layer_cache: Tensor, *, tokens: int, heads: int, workspace: AttentionWorkspace
) -> PreparedAttention:
    """Make what the layers of a step have in common, for ``tokens`` with ``heads`` query heads each.

    Valid for one step: the next one may use the workspace's memory. ``layer_cache`` may be any layer's.
    """
    decode: PreparedDecode | PreparedPaged | DecodeItems | SharedItems | None = None
    if isinstance(plan.decode, DecodeItems | SharedItems):
        decode = plan.decode
    elif isinstance(plan.decode, PagedRows):
        decode = prepare_paged(plan.decode, layer_cache, heads=heads)
    elif plan.decode is not None:
        decode = prepare_decode(plan.decode, layer_cache, tokens=tokens, heads=heads, workspace=workspace)
    prefill = plan.prefill
    return PreparedAttention(
        window=plan.window,
        decode=decode,
        prefill=prepare_paged_runs(prefill, layer_cache, heads=heads) if isinstance(prefill, PagedRuns) else prefill,
        workspace=workspace,
    )


def paged_attention(
    q_TND: Tensor,
    layer_cache: Tensor,
    prepared: PreparedAttention,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """Return each token's causal attention over its sequence's cached keys, its own included.

    The keys and values of the batch must have been written before. Query head n belongs to KV head n // (N / K).
    The softmax is float32. ``soft_cap`` and sinks are those of ``AttentionOptions``. All but Triton's way also take
    caches of one part, [1, ...], of keys that are values too.

    Shapes: q_TND [tokens, heads, head size], last axis contiguous; layer_cache [2, blocks, KV heads, block
    size, head size] contiguous; sinks_N [heads] float32; returns [tokens, heads, head size] contiguous; all of the
    workspace's type, a cache for Triton's kernels perhaps of 8 bits
    Source: PagedAttention (arXiv 2309.06180), section 4
    """
    tokens, heads, head_size = q_TND.shape
    kv_heads = layer_cache.shape[2]
    q_TKGD = q_TND.unflatten(1, (kv_heads, -1))
    out_TND = torch.empty((tokens, heads, head_size), dtype=q_TND.dtype, device=q_TND.device)
    out_TKGD = out_TND.unflatten(1, (kv_heads, -1))
    options = AttentionOptions(scale=scale, window=prepared.window, soft_cap=soft_cap, sinks_N=sinks_N)
    if isinstance(prepared.decode, DecodeItems):
        decode_attention(q_TND, layer_cache, prepared.decode, options, out_TND)
    elif isinstance(prepared.decode, SharedItems):
        shared_decode_attention(q_TND, layer_cache, prepared.decode, options, out_TND)
    elif isinstance(prepared.decode, PreparedPaged):
        attend_paged(q_TND, layer_cache, prepared.decode, options, out_TND=out_TND)
    elif prepared.decode is not None:
        attend_decode(q_TKGD, layer_cache, prepared.decode, options, out_TKGD=out_TKGD)
    if isinstance(prepared.prefill, PrefillItems):
        prefill_attention(q_TND, layer_cache, prepared.prefill, options, out_TND)
        return out_TND
    if isinstance(prepared.prefill, PreparedRuns):
        attend_paged_runs(q_TND, layer_cache, prepared.prefill, options, out_TND=out_TND)
        return out_TND
    for group in prepared.prefill:
        attend_prefill(q_TKGD, layer_cache, group, options, workspace=prepared.workspace, out_TKGD=out_TKGD)
    return out_TND
