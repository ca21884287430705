"""The experts' MLPs: tokens sorted by expert, one product per expert, results added up per token.

Shapes: T tokens, H hidden size, I intermediate size, E experts, A chosen experts per token.
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
    order = torch.argsort(experts_TA.flatten(), stable=True)
    tokens = torch.div(order, chosen, rounding_mode="floor")
    counts = torch.bincount(experts_TA.flatten(), minlength=len(gate_up)).tolist()
    sorted_x = x_TH.index_select(0, tokens)
    # Results go back to (token, choice) order: row order[i] of by_choice is the i-th of the sorted rows.
    by_choice = x_TH.new_empty((num_tokens * chosen, x_TH.shape[1]))
    first = 0
    for expert, count in enumerate(counts):
        if count:
            hidden = silu_and_mul(gate_up[expert](sorted_x[first : first + count], None))
            by_choice[order[first : first + count]] = down[expert](hidden, None)
            first += count
    return _weighted_sum(by_choice.view(num_tokens, chosen, x_TH.shape[1]), weights_TA)


def _weighted_sum(by_choice_TAH: Tensor, weights_TA: Tensor) -> Tensor:
    total_TH = by_choice_TAH[:, 0].float() * weights_TA[:, :1]
    for choice in range(1, weights_TA.shape[1]):
        total_TH.addcmul_(by_choice_TAH[:, choice].float(), weights_TA[:, choice : choice + 1])
    return total_TH.to(by_choice_TAH.dtype)
