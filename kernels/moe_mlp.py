"""The experts' MLPs: tokens sorted by expert, products expert by expert, results added up per token.

``moe_mlp`` is all of it on one rank. Where experts are spread over ranks, ``comm`` puts the exchange of rows between
its three parts: ``moe_sort.sort_by_expert``, ``expert_products`` and ``moe_combine.weighted_sum``. On GPUs, with
weights that are stacked, ``moe_mlp_stacked`` and ``stacked_products`` do the same in a fixed number of launches, and
read nothing back.

Shapes: T tokens, H hidden size, I intermediate size, E experts, A chosen experts per token, R = T * A rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .gate import SILU, Gate
from .gated import gate_and_mul
from .moe_combine import weighted_sum
from .moe_gemm import block_places, block_product, can_gate, can_mask, can_multiply, masked_product
from .moe_sort import ExpertBlocks, cut_into_blocks, sort_by_expert, sort_into_blocks, unsort

Product = Callable[[Tensor, Tensor | None], Tensor]


def moe_mlp(
    x_TH: Tensor,
    weights_TA: Tensor,
    experts_TA: Tensor,
    gate_up: Sequence[Product],
    down: Sequence[Product],
    gate: Gate = SILU,
) -> Tensor:
    """Run each token through its experts and return their weighted sum.

    The sum runs in float32 and in the order of ``experts_TA``, so it does not depend on the other tokens.

    ``gate_up`` and ``down`` multiply with an expert's weights, and are given no bias: gate_up [rows, hidden] to [rows,
    2 * intermediate], gate first; down [rows, intermediate] to [rows, hidden].

    Shapes: x_TH [tokens, hidden]; weights_TA [tokens, chosen] float32; experts_TA [tokens, chosen] int64
    """
    num_tokens, chosen = experts_TA.shape
    order_R, counts_E = sort_by_expert(experts_TA.flatten(), len(gate_up))
    rows_RH = x_TH.index_select(0, torch.div(order_R, chosen, rounding_mode="floor"))
    results_RH = expert_products(rows_RH, counts_E, gate_up, down, gate)
    by_choice_TAH = unsort(results_RH, order_R).view(num_tokens, chosen, x_TH.shape[1])
    return weighted_sum(by_choice_TAH, weights_TA)


def expert_products(
    rows_RH: Tensor, counts_E: Tensor, gate_up: Sequence[Product], down: Sequence[Product], gate: Gate = SILU
) -> Tensor:
    """Return what each expert makes of its rows.

    Rows behind the last counted one are padding; what stands in their place in the result has no meaning. The result is
    of the type that ``down`` returns; without a counted row, of the rows' own.

    Shapes: rows_RH [rows, hidden], sorted by expert; counts_E [experts] int64; returns [rows, hidden]
    """
    results_RH: Tensor | None = None
    first = 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            hidden_RI = gate_and_mul(gate_up[expert](rows_RH[first : first + count], None), gate)
            made_RH = down[expert](hidden_RI, None)
            if results_RH is None:
                results_RH = rows_RH.new_empty(rows_RH.shape, dtype=made_RH.dtype)
            results_RH[first : first + count] = made_RH
            first += count
    return torch.empty_like(rows_RH) if results_RH is None else results_RH


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedExperts:
    """The weights of experts, for kernels that multiply with all of them in one launch.

    Shapes: gate_up_EOH [experts, 2 * intermediate, hidden], gate first; down_EHI [experts, hidden, intermediate]; both
    contiguous; gate_up_biases_EO [experts, 2 * intermediate], down_biases_EH [experts, hidden]
    """

    gate_up_EOH: Tensor
    down_EHI: Tensor
    gate: Gate = SILU
    gate_up_biases_EO: Tensor | None = None
    down_biases_EH: Tensor | None = None

    def can_multiply(self, x_TH: Tensor) -> bool:
        """Return whether kernels take these weights and rows such as ``x``."""
        return can_gate(self.gate) and can_multiply(x_TH, self.gate_up_EOH) and can_multiply(x_TH, self.down_EHI)


def moe_mlp_stacked(x_TH: Tensor, weights_TA: Tensor, experts_TA: Tensor, experts: StackedExperts) -> Tensor:
    """As ``moe_mlp``; between the products, numbers are rounded once, behind the activation.

    Shapes: as ``moe_mlp``; a token's experts are different ones
    """
    num_tokens, chosen = experts_TA.shape
    if can_mask(x_TH.dtype, num_tokens, chosen):
        hidden_RI = masked_product(
            x_TH,
            experts.gate_up_EOH,
            experts_TA,
            is_gated=True,
            biases_EO=experts.gate_up_biases_EO,
            gate=experts.gate,
        )
        results_RH = masked_product(
            hidden_RI, experts.down_EHI, experts_TA, is_gated=False, biases_EO=experts.down_biases_EH
        )
    else:
        entries = num_tokens * chosen
        blocks = sort_into_blocks(experts_TA.flatten(), len(experts.down_EHI), block_places(experts.down_EHI, entries))
        results_RH = _multiply(x_TH, blocks, entries, experts)
    return weighted_sum(results_RH.view(num_tokens, chosen, x_TH.shape[1]), weights_TA)


def stacked_products(rows_RH: Tensor, counts_E: Tensor, experts: StackedExperts) -> Tensor:
    """As ``expert_products``.

    Shapes: rows_RH [rows, hidden], sorted by expert; counts_E [experts] int64; returns [rows, hidden]
    """
    rows = len(rows_RH)
    return _multiply(rows_RH, cut_into_blocks(counts_E, rows, block_places(experts.down_EHI, rows)), rows, experts)


def _multiply(x_TH: Tensor, blocks: ExpertBlocks, entries: int, experts: StackedExperts) -> Tensor:
    hidden_RI = block_product(
        x_TH,
        experts.gate_up_EOH,
        blocks,
        entries=entries,
        is_gated=True,
        biases_EO=experts.gate_up_biases_EO,
        gate=experts.gate,
    )
    return block_product(
        hidden_RI, experts.down_EHI, blocks, entries=entries, is_gated=False, biases_EO=experts.down_biases_EH
    )
