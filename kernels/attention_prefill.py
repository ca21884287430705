"""Attention of rows with several queries over the paged cache: one row at a time, in tiles of queries.

The keys and values of a row are gathered once a layer, for as many KV heads at a time as fit the workspace's
share; each tile then multiplies with the slice of keys that it sees. The query heads of a KV head are rows of
one product.

Shapes: T tokens, N query heads, K KV heads (of the group at work), G query heads per KV head, Q queries of a
tile, L keys, D head size; a layer's cache is [2, num_blocks, K, block_size, D].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_plan import PrefillRow, key_unit
from .attention_workspace import GATHER_BYTES, AttentionWorkspace

QUERY_TILE = 128
SMALLEST_TILE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tile:
    """Queries ``first`` to ``first + count`` of a row, padded to ``padded`` (few shapes: each new one costs
    set-up time), and the columns of the row's gathered keys that they may see.

    ``query_column`` is the column of the first query's own key; ``oldest_column`` that of the oldest key it
    sees, None without a window.
    """

    first: int
    count: int
    padded: int
    first_column: int
    last_column: int
    query_column: int
    oldest_column: int | None


def attend_prefill(
    q_TND: Tensor,
    layer_cache: Tensor,
    row: PrefillRow,
    *,
    window: int | None,
    scale: float,
    workspace: AttentionWorkspace,
    out_TND: Tensor,
) -> None:
    """Compute the attention of one row into its places in ``out_TND``.

    Shapes: q_TND, out_TND [tokens, heads, head size]; layer_cache [2, blocks, KV heads, block size, head
    size] contiguous; all of the workspace's type
    """
    _, _, kv_heads, block_size, head_size = layer_cache.shape
    span = slice(row.first_token, row.first_token + row.count)
    q_TKGD = q_TND[span].view(row.count, kv_heads, -1, head_size)
    out_TKGD = out_TND[span].view(row.count, kv_heads, -1, head_size)
    head_bytes = 2 * row.gather_KB.shape[1] * block_size * head_size * q_TND.element_size()
    at_once = max(1, min(kv_heads, GATHER_BYTES // head_bytes))
    tiles = _tiles(row, window=window, unit=key_unit(block_size))
    for first in range(0, kv_heads, at_once):
        heads = slice(first, min(kv_heads, first + at_once))
        keys_KLD, values_KLD = _gather(layer_cache, row.gather_KB[heads], workspace)
        for tile in tiles:
            queries = slice(tile.first, tile.first + tile.count)
            _attend_tile(
                q_TKGD[queries, heads],
                keys_KLD[:, tile.first_column : tile.last_column],
                values_KLD[:, tile.first_column : tile.last_column],
                tile,
                scale=scale,
                unit=key_unit(block_size),
                workspace=workspace,
                out_QKGD=out_TKGD[queries, heads],
            )


def _tiles(row: PrefillRow, *, window: int | None, unit: int) -> list[_Tile]:
    tiles = []
    for first in range(0, row.count, QUERY_TILE):
        count = min(QUERY_TILE, row.count - first)
        query_column = row.start + first - row.first_key
        oldest = None if window is None else query_column - (window - 1)
        tiles.append(
            _Tile(
                first=first,
                count=count,
                padded=max(SMALLEST_TILE, 1 << (count - 1).bit_length()),
                first_column=0 if oldest is None else max(0, oldest) // unit * unit,
                last_column=-(-(query_column + count) // unit) * unit,
                query_column=query_column,
                oldest_column=oldest,
            )
        )
    return tiles


def _gather(layer_cache: Tensor, gather_KB: Tensor, workspace: AttentionWorkspace) -> tuple[Tensor, Tensor]:
    block_size, head_size = layer_cache.shape[3:]
    rows = gather_KB.reshape(-1)
    keys_out = workspace.take("prefill keys", (rows.shape[0], block_size * head_size))
    values_out = workspace.take("prefill values", (rows.shape[0], block_size * head_size))
    torch.index_select(layer_cache[0].view(-1, block_size * head_size), 0, rows, out=keys_out)
    torch.index_select(layer_cache[1].view(-1, block_size * head_size), 0, rows, out=values_out)
    return keys_out.view(gather_KB.shape[0], -1, head_size), values_out.view(gather_KB.shape[0], -1, head_size)


def _attend_tile(
    q_QKGD: Tensor,
    keys_KLD: Tensor,
    values_KLD: Tensor,
    tile: _Tile,
    *,
    scale: float,
    unit: int,
    workspace: AttentionWorkspace,
    out_QKGD: Tensor,
) -> None:
    count, kv_heads, group, head_size = q_QKGD.shape
    columns = keys_KLD.shape[1]
    packed_KGQD = workspace.take("prefill queries", (kv_heads, group, tile.padded, head_size))
    packed_KGQD[:, :, :count].copy_(q_QKGD.permute(1, 2, 0, 3))
    packed_KGQD[:, :, count:].zero_()
    scores_KML = workspace.take("prefill scores", (kv_heads, group * tile.padded, columns))
    # beta=0: what the buffer held does not count, only its memory does.
    torch.baddbmm(
        scores_KML,
        packed_KGQD.view(kv_heads, -1, head_size),
        keys_KLD.transpose(1, 2),
        beta=0,
        alpha=scale,
        out=scores_KML,
    )
    _hide_unseen(scores_KML.view(kv_heads, group, tile.padded, columns), tile, unit=unit, workspace=workspace)
    weights_KML = workspace.take("prefill weights", scores_KML.shape)
    torch.softmax(scores_KML, dim=-1, out=weights_KML)
    result_KMD = workspace.take("prefill results", (kv_heads, group * tile.padded, head_size))
    torch.bmm(weights_KML, values_KLD, out=result_KMD)
    result_KGQD = result_KMD.view(kv_heads, group, tile.padded, head_size)
    out_QKGD.copy_(result_KGQD[:, :, :count].permute(2, 0, 1, 3))


def _hide_unseen(scores_KGQL: Tensor, tile: _Tile, *, unit: int, workspace: AttentionWorkspace) -> None:
    # Only the slanted edges need a mask: to the left of the first query's key everything is seen but what the
    # window hides, and the constant masks are cut to where the edge lies.
    own = tile.query_column - tile.first_column
    future_QL = workspace.future_mask(QUERY_TILE, QUERY_TILE + unit)
    width = scores_KGQL.shape[-1] - own
    scores_KGQL[..., own:].add_(future_QL[: tile.padded, :width])
    if tile.oldest_column is None:
        return
    past_QL = workspace.past_mask(QUERY_TILE, QUERY_TILE + unit)
    edge = tile.oldest_column - tile.first_column
    width = min(edge + tile.count, scores_KGQL.shape[-1])
    if width > 0:
        shift = unit - edge
        scores_KGQL[..., :width].add_(past_QL[: tile.padded, shift : shift + width])
