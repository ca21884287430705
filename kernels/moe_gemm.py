"""The experts' MLPs: tokens sorted by expert, one product per expert, results added up per token.

``moe_mlp`` is all of it on one rank. Where experts are spread over ranks, ``comm`` puts the exchange of rows between
its three parts: ``sort_by_expert``, ``expert_products`` and ``weighted_sum``.

Shapes: T tokens, H hidden size, I intermediate size, E experts, A chosen experts per token, R = T * A rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .activation import silu_and_mul

Product = Callable[[Tensor, Tensor | None], Tensor]


def moe_mlp(
    x_TH: Tensor, weights_TA: Tensor, experts_TA: Tensor, gate_up: Sequence[Product], down: Sequence[Product]
) -> Tensor:
    """Run each token through its experts and return their weighted sum.

    The sum runs in float32 and in the order of ``experts_TA``, so it does not depend on the other tokens.

    ``gate_up`` and ``down`` multiply with an expert's weights (and no bias): gate_up [rows, hidden] to [rows, 2 *
    intermediate], gate first; down [rows, intermediate] to [rows, hidden].

    Shapes: x_TH [tokens, hidden]; weights_TA [tokens, chosen] float32; experts_TA [tokens, chosen] int64
    """
    num_tokens, chosen = experts_TA.shape
    order_R, counts_E = sort_by_expert(experts_TA.flatten(), len(gate_up))
    rows_RH = x_TH.index_select(0, torch.div(order_R, chosen, rounding_mode="floor"))
    results_RH = expert_products(rows_RH, counts_E, gate_up, down)
    by_choice_TAH = unsort(results_RH, order_R).view(num_tokens, chosen, x_TH.shape[1])
    return weighted_sum(by_choice_TAH, weights_TA)


def sort_by_expert(experts_R: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return (order, counts): which row stands where when they are sorted by expert, and how many each expert has.

    Rows of one expert keep their order.

    Shapes: experts_R [rows] int64; order [rows] int64; counts [experts] int64
    """
    return torch.argsort(experts_R, stable=True), count_by_expert(experts_R, num_experts)


def count_by_expert(experts_R: Tensor, num_experts: int) -> Tensor:
    """Return each expert's number of rows, without reading anything back from a GPU, as ``bincount`` would.

    Shapes: experts_R [rows] int64; returns [experts] int64
    """
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=experts_R.device)
    return counts_E.scatter_add_(0, experts_R, torch.ones_like(experts_R))


def unsort(sorted_RH: Tensor, order_R: Tensor) -> Tensor:
    """Return rows as they stood before they were put into ``order_R``.

    Shapes: sorted_RH [rows, hidden]; order_R [rows] int64, each row once
    """
    return torch.empty_like(sorted_RH).index_copy_(0, order_R, sorted_RH)


def expert_products(rows_RH: Tensor, counts_E: Tensor, gate_up: Sequence[Product], down: Sequence[Product]) -> Tensor:
    """Return what each expert makes of its rows.

    Rows behind the last counted one are padding; what stands in their place in the result has no meaning. The result is
    of the type that ``down`` returns; without a counted row, of the rows' own.

    Shapes: rows_RH [rows, hidden], sorted by expert; counts_E [experts] int64; returns [rows, hidden]
    """
    results_RH: Tensor | None = None
    first = 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            hidden_RI = silu_and_mul(gate_up[expert](rows_RH[first : first + count], None))
            made_RH = down[expert](hidden_RI, None)
            if results_RH is None:
                results_RH = rows_RH.new_empty(rows_RH.shape, dtype=made_RH.dtype)
            results_RH[first : first + count] = made_RH
            first += count
    return torch.empty_like(rows_RH) if results_RH is None else results_RH


def weighted_sum(by_choice_TAH: Tensor, weights_TA: Tensor) -> Tensor:
    """Add up each token's results with their weights: in float32, first choice first.

    Shapes: by_choice_TAH [tokens, chosen, hidden]; weights_TA [tokens, chosen] float32; returns [tokens, hidden] of
    by_choice's type
    """
    total_TH = by_choice_TAH[:, 0].float() * weights_TA[:, :1]
    for choice in range(1, weights_TA.shape[1]):
        total_TH.addcmul_(by_choice_TAH[:, choice].float(), weights_TA[:, choice : choice + 1])
    return total_TH.to(by_choice_TAH.dtype)
