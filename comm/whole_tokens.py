"""Tokens all of whose experts are on one rank: summed there, so that one row comes back instead of one for each.

The sum is the one that the token's own rank would make, in float32 and in the order of the choices, so it has the same
bits; a sum of some of them would not. For that, a row travels with its token's choices: the slots, as their rank counts
them, and the weights. With one choice a token there is nothing to sum, and nothing more travels.

Shapes: T tokens, R rows, H hidden size, A chosen experts per token, K entries (a row and where it is wanted), E entries
with one for each expert, B bytes of a row with its choices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.moe_combine import weighted_sum
from .expert_hop import Entries


def choice_bytes(chosen: int) -> int:
    """Return the bytes of the choices that travel with a row: an int32 and a float32 each."""
    return 8 * chosen if chosen > 1 else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A rank's tokens as they leave: one entry for a token that is summed elsewhere, otherwise one a choice.

    Places count ``slots_per_rank + 1`` a rank: the last is that of tokens which are summed there.

    Shapes: rows_TB [tokens, bytes] uint8, or the rows as they were with one choice; whole_T [tokens] bool
    """

    rows_TB: Tensor
    entries: Entries
    whole_T: Tensor


def outgoing(x_TH: Tensor, weights_TA: Tensor, slot_TA: Tensor, *, slots_per_rank: int, rank: int) -> Outgoing:
    """Return what leaves a rank when its tokens want these slots, which count through the ranks.

    Shapes: x_TH [tokens, hidden]; weights_TA [tokens, chosen] float32; slot_TA [tokens, chosen] int64
    """
    tokens, chosen = slot_TA.shape
    rank_TA = torch.div(slot_TA, slots_per_rank, rounding_mode="floor")
    own_TA = slot_TA - rank_TA * slots_per_rank
    whole_T = (rank_TA == rank_TA[:, :1]).all(1) if chosen > 1 else torch.zeros_like(slot_TA[:, 0], dtype=torch.bool)
    # Of a token that is summed elsewhere the first choice stands for all.
    travels_TA = ~whole_T[:, None].expand(tokens, chosen).clone()
    travels_TA[:, 0] = True
    place_TA = rank_TA * (slots_per_rank + 1) + own_TA.masked_fill(whole_T[:, None], slots_per_rank)
    row_K, choice_K = travels_TA.nonzero().unbind(1)
    rows_TB = x_TH
    if chosen > 1:
        choices_TB = torch.cat([own_TA.to(torch.int32), weights_TA.view(torch.int32)], dim=1).view(torch.uint8)
        rows_TB = torch.cat([x_TH.contiguous().view(torch.uint8), choices_TB], dim=1)
    entries = Entries(row_K=row_K, place_K=place_TA[row_K, choice_K], origin_K=torch.full_like(row_K, rank))
    return Outgoing(rows_TB=rows_TB, entries=entries, whole_T=whole_T)


def restored(returned_KH: Tensor, weights_TA: Tensor, whole_T: Tensor) -> Tensor:
    """Return every token's weighted sum, of the rows that came back for the entries that had left.

    Shapes: returned_KH [entries, hidden]; weights_TA [tokens, chosen] float32; whole_T [tokens] bool
    """
    tokens, chosen = weights_TA.shape
    if len(returned_KH) == tokens * chosen:
        return weighted_sum(returned_KH.view(tokens, chosen, returned_KH.shape[1]), weights_TA)
    count_T = torch.where(whole_T, 1, chosen)
    first_T = count_T.cumsum(0) - count_T
    output_TH = returned_KH.new_empty((tokens, returned_KH.shape[1]))
    output_TH[whole_T] = returned_KH.index_select(0, first_T[whole_T])
    apart_T = ~whole_T
    by_choice_TA = first_T[apart_T, None] + torch.arange(chosen, device=first_T.device)
    output_TH[apart_T] = _summed(returned_KH, by_choice_TA, weights_TA[apart_T])
    return output_TH


@dataclass(frozen=True, slots=True, kw_only=True)
class Expanded:
    """Entries that have arrived, one for each expert; what ``folded`` needs to make one of some again.

    Shapes: row_E, slot_E, origin_E [entries of experts] int64; first_K [entries] int64, the first of each entry's;
    whole_K [entries] bool; weights_WA [whole tokens, chosen] float32
    """

    row_E: Tensor
    slot_E: Tensor
    origin_E: Tensor
    first_K: Tensor
    whole_K: Tensor
    weights_WA: Tensor


def expanded(rows_RB: Tensor, entries: Entries, *, chosen: int, slots_per_rank: int) -> Expanded:
    """Return the entries of experts, in the order in which their rows' entries arrived and in that of the choices.

    Shapes: rows_RB [rows, bytes]
    """
    whole_K = entries.place_K == slots_per_rank
    count_K = torch.where(whole_K, chosen, 1)
    first_K = count_K.cumsum(0) - count_K
    size = int(count_K.sum())
    if size == len(count_K):
        return Expanded(
            row_E=entries.row_K,
            slot_E=entries.place_K,
            origin_E=entries.origin_K,
            first_K=first_K,
            whole_K=whole_K,
            weights_WA=torch.empty((0, chosen), device=whole_K.device),
        )
    choices_RA = rows_RB[:, -choice_bytes(chosen) :].contiguous().view(torch.int32)
    entry_E = torch.arange(len(count_K), device=whole_K.device).repeat_interleave(count_K, output_size=size)
    row_E = entries.row_K[entry_E]
    nth_E = torch.arange(size, device=whole_K.device) - first_K[entry_E]
    slot_E = torch.where(whole_K[entry_E], choices_RA[row_E, nth_E].to(torch.int64), entries.place_K[entry_E])
    weights_WA = choices_RA[entries.row_K[whole_K], chosen:].contiguous().view(torch.float32)
    return Expanded(
        row_E=row_E,
        slot_E=slot_E,
        origin_E=entries.origin_K[entry_E],
        first_K=first_K,
        whole_K=whole_K,
        weights_WA=weights_WA,
    )


def folded(results_EH: Tensor, arrived: Expanded) -> Tensor:
    """Return one row for each entry that arrived: an expert's, or a whole token's weighted sum.

    Shapes: results_EH [entries of experts, hidden], in the order of ``arrived``; returns [entries, hidden]
    """
    if len(results_EH) == len(arrived.first_K):
        return results_EH
    rows_KH = results_EH.index_select(0, arrived.first_K)
    chosen = arrived.weights_WA.shape[1]
    by_choice_WA = arrived.first_K[arrived.whole_K, None] + torch.arange(chosen, device=rows_KH.device)
    rows_KH[arrived.whole_K] = _summed(results_EH, by_choice_WA, arrived.weights_WA)
    return rows_KH


def _summed(rows_EH: Tensor, by_choice_TA: Tensor, weights_TA: Tensor) -> Tensor:
    """Return the weighted sums of the rows that these indices name. [tokens, hidden]"""
    by_choice_TAH = rows_EH.index_select(0, by_choice_TA.flatten()).view(*by_choice_TA.shape, rows_EH.shape[1])
    return weighted_sum(by_choice_TAH, weights_TA)
