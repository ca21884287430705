"""Attention over the paged cache: the one entry for a batch of rows of any kind.

Shapes: T tokens, N query heads, K KV heads, D head size; a layer's cache is [2, num_blocks, K, block_size, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_decode import attend_decode
from .attention_plan import AttentionPlan
from .attention_prefill import attend_prefill
from .attention_workspace import AttentionWorkspace


def paged_attention(
    q_TND: Tensor, layer_cache: Tensor, plan: AttentionPlan, *, scale: float, workspace: AttentionWorkspace
) -> Tensor:
    """Return each token's causal attention over its sequence's cached keys, its own included.

    The keys and values of the batch must have been written before. Query head n belongs to KV head n // (N / K).
    The softmax is float32.

    Shapes: q_TND [tokens, heads, head size], last axis contiguous; layer_cache [2, blocks, KV heads, block
    size, head size] contiguous; returns [tokens, heads, head size] contiguous; all of the workspace's type
    Source: PagedAttention (arXiv 2309.06180), section 4
    """
    tokens, _, head_size = q_TND.shape
    kv_heads = layer_cache.shape[2]
    q_TKGD = q_TND.unflatten(1, (kv_heads, -1))
    out_TKGD = torch.empty(q_TKGD.shape, dtype=q_TND.dtype, device=q_TND.device)
    if plan.decode is not None:
        attend_decode(q_TKGD, layer_cache, plan.decode, scale=scale, workspace=workspace, out_TKGD=out_TKGD)
    for group in plan.prefill:
        attend_prefill(q_TKGD, layer_cache, group, scale=scale, workspace=workspace, out_TKGD=out_TKGD)
    return out_TKGD.view(tokens, -1, head_size)
