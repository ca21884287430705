"""Attention whose keys come in several turns: each turn's result is merged into what there is by its log-sum-exp.

Shapes: T tokens, K KV heads, G query heads per KV head, N = K * G, Q queries of a tile, P pairs of row and KV head, M =
G * Q, L keys, D head size; a layer's cache is [2, num_blocks, K, block_size, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention_span import AttentionOptions
from .attention_prefill import gather_parts, load_queries, tile_scores
from .attention_prefill_plan import PrefillGroup, PrefillTile
from .attention_products import attend_some, gather_keys_values
from .attention_workspace import AttentionWorkspace


class PartialAttention:
    """The attention of some tokens of one layer, as far as their keys have come. Reused from layer to layer.

    Shapes: _results_KGTD, _log_sums_KGT float32
    """

    def __init__(self, *, tokens: int, heads: int, kv_heads: int, head_size: int, device: torch.device) -> None:
        shape = (kv_heads, heads // kv_heads, tokens)
        self._results_KGTD = torch.empty((*shape, head_size), dtype=torch.float32, device=device)
        self._log_sums_KGT = torch.empty(shape, dtype=torch.float32, device=device)

    def attend(
        self,
        q_TND: Tensor,
        layer_cache: Tensor,
        group: PrefillGroup,
        options: AttentionOptions,
        *,
        first: bool,
        workspace: AttentionWorkspace,
    ) -> None:
        """Let the group's queries attend to its keys. Each token must be in one tile of its ``first`` turn, in which a
        query must see a key.

        Shapes: q_TND [tokens, heads, head size], last axis contiguous; layer_cache [2, blocks, KV heads, block size,
        head size] contiguous; all of the workspace's type
        """
        block_size, kv_heads = layer_cache.shape[3], layer_cache.shape[2]
        q_TKGD = q_TND.unflatten(1, (kv_heads, -1))
        for rows, heads in gather_parts(group, layer_cache, q_TKGD.shape[2]):
            gathered = group.gather_RKB[rows, heads]
            keys_PLD, values_PLD = gather_keys_values(
                layer_cache, gathered.reshape(-1), keys=gathered.shape[2] * block_size, workspace=workspace
            )
            for tile in group.tiles:
                result_KGQD, log_sums_KGQ = _attend_tile(
                    q_TKGD[:, heads], keys_PLD, values_PLD, tile, options, workspace=workspace
                )
                self._take(result_KGQD, log_sums_KGQ, heads=heads, tile=tile, first=first)

    def finish(self, dtype: torch.dtype, options: AttentionOptions) -> Tensor:
        """Return the attention to all keys that came, [tokens, heads, head size]; valid until the next layer.

        Sinks have their share only now, when all keys have theirs.
        """
        if options.sinks_N is not None:
            sinks_KG1 = options.sinks_N.view(*self._log_sums_KGT.shape[:2], 1)
            self._results_KGTD.mul_(torch.sigmoid(self._log_sums_KGT - sinks_KG1).unsqueeze(-1))
        return self._results_KGTD.permute(2, 0, 1, 3).flatten(1, 2).to(dtype)

    def _take(self, result_KGQD: Tensor, log_sums_KGQ: Tensor, *, heads: slice, tile: PrefillTile, first: bool) -> None:
        """Merge a tile's result. A log-sum-exp is as good as a largest score and its sum, and one number less."""
        assert tile.place is not None, "a group of one row"
        own = tile.place.stop - tile.place.start
        result_KGQD, log_sums_KGQ = result_KGQD[:, :, :own], log_sums_KGQ[:, :, :own]
        so_far_KGQD = self._results_KGTD[heads, :, tile.place]
        so_far_KGQ = self._log_sums_KGT[heads, :, tile.place]
        if first:
            so_far_KGQD.copy_(result_KGQD)
            so_far_KGQ.copy_(log_sums_KGQ)
            return
        both_KGQ = torch.logaddexp(so_far_KGQ, log_sums_KGQ)
        so_far_KGQD.mul_((so_far_KGQ - both_KGQ).exp_().unsqueeze(-1))
        so_far_KGQD.addcmul_(result_KGQD.float(), (log_sums_KGQ - both_KGQ).exp_().unsqueeze(-1))
        so_far_KGQ.copy_(both_KGQ)


def _attend_tile(
    q_TKGD: Tensor,
    keys_PLD: Tensor,
    values_PLD: Tensor,
    tile: PrefillTile,
    options: AttentionOptions,
    *,
    workspace: AttentionWorkspace,
) -> tuple[Tensor, Tensor]:
    """Return results [KV heads, group, queries, head size] and their log-sum-exps; valid until the next call."""
    q_1KGQD = load_queries(q_TKGD, tile, slice(0, 1), rows=1, workspace=workspace)
    ((first, last),) = tile.ranges
    scores_PML = tile_scores(
        q_1KGQD, keys_PLD, tile, options, first, last, mask_R11QW=tile.mask_R11QW, workspace=workspace
    )
    result_PMD, log_sums_PM = attend_some(scores_PML, values_PLD[:, first:last], workspace=workspace)
    shape = q_1KGQD.shape[1:]
    return result_PMD.view(shape), log_sums_PM.view(shape[:3])
