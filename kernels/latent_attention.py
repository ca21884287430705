"""Attention to latents over the paged cache: the one entry for a batch of rows of any kind.

Triton's kernels read a latent once as key and value (``mla``, ``mla_prefill``). Every other way is the one of ordinary
attention, over a cache whose one part is keys and values: their results have the rotated part's numbers besides, which
nobody needs.

Shapes: T tokens, N query heads, L latent size, W = L + rotated size; a layer's cache is [1, num_blocks, 1, block_size,
W].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import PreparedAttention, paged_attention
from .attention_items import DecodeItems, PrefillItems
from .mla import mla_decode
from .mla_prefill import mla_prefill
from .mla_span import MlaOptions


def latent_attention(q_TNW: Tensor, layer_cache: Tensor, prepared: PreparedAttention, options: MlaOptions) -> Tensor:
    """Return each token's causal attention over its sequence's cached latents, its own included.

    The latents of the batch must have been written before. ``prepared`` was planned for ``options.latent``.

    Shapes: q_TNW [tokens, heads, W] absorbed queries, contiguous; layer_cache [1, blocks, 1, block size, W] contiguous;
    returns [tokens, heads, L]
    """
    decode, prefill = prepared.decode, prepared.prefill
    if not isinstance(decode, DecodeItems) and not isinstance(prefill, PrefillItems):
        return paged_attention(q_TNW, layer_cache, prepared, scale=options.scale)[..., : options.latent]
    cache_BSW = layer_cache[0, :, 0]
    out_TNL = torch.empty((*q_TNW.shape[:2], options.latent), dtype=q_TNW.dtype, device=q_TNW.device)
    if isinstance(decode, DecodeItems):
        mla_decode(q_TNW, cache_BSW, decode, options, out_TNL)
    if isinstance(prefill, PrefillItems):
        mla_prefill(q_TNW, cache_BSW, prefill, options, out_TNL)
    return out_TNL
