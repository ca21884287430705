"""A mixture of experts whose experts are spread over ranks: tokens go to their experts, and what becomes of them back.

Nothing is dropped and nothing rounds on the way, so a token's result has the bits that ``kernels.moe_mlp.moe_mlp``
gives it on one rank: experts see their rows in the order of ranks and tokens, and each token's sum runs in float32 in
the order of its choices. A token all of whose experts are on one rank is summed there, and one row comes back
(``whole_tokens``). Of any other each expert's row comes back, and its own rank adds them up: a sum of some of them
would save bytes and change bits.

The ranks are given as ``levels``, from the outermost: one group of all of them (flat), or the group of the ranks with
this one's place on each host, then the group of this host's ranks (hierarchical). With several levels a token crosses
each of them at most once on the way there, whatever number of its experts lies behind; on the way back each row crosses
them all. A rank's number counts with the last level fastest.

Below: ``expert_hop`` (one level), ``whole_tokens``, ``expert_map`` (where experts live). Beside: ``expert_gather`` (for
few tokens that all ranks have), ``expert_padded`` (fixed shapes), ``expert_traffic`` (what all this sends). Knows
neither layers nor weights: products are the caller's.

Shapes: T tokens, H hidden size, A chosen experts per token, K entries (a row for one expert), E experts, S slots of a
rank, B bytes of a row with its token's choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..kernels.moe_sort import count_by_expert, unsort
from .collectives import Collectives
from .expert_hop import Arrival, hop, hop_back, misuse, movable
from .expert_map import ExpertMap
from .level_gather import place_in
from .overlap import Steps
from .whole_tokens import Expanded, choice_bytes, expanded, folded, outgoing, restored

Products: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""What the experts in a rank's slots make of rows sorted by slot: (rows [rows, hidden], counts [slots] int64) to
[rows, hidden]; of one type on all ranks, which may be another than the rows'. Such as ``kernels.moe_mlp``'s
``expert_products`` with the weights filled in. It may be called without any rows."""

Shared: TypeAlias = Callable[[], Tensor]
"""Computes what every token gets, as shared experts do: [tokens, hidden]. Called once, while rows are on their way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """What came of a rank's tokens.

    Shapes: output_TH [tokens, hidden]; load_E [experts] int64, this rank's tokens by expert, whichever replica
    """

    output_TH: Tensor
    load_E: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatched:
    """The rows that reached this rank's experts.

    Shapes: rows_KH [entries, hidden], sorted by slot, then by the rank and the place among its tokens that they came
    from; counts_S [slots] int64; order_K [entries] int64, where each stood on arrival; whole_T [this rank's tokens]
    bool, those that are summed where their experts are
    """

    rows_KH: Tensor
    counts_S: Tensor
    order_K: Tensor
    arrived: Expanded
    arrivals: tuple[Arrival, ...]
    whole_T: Tensor


def mix(
    levels: Sequence[Collectives],
    x_TH: Tensor,
    weights_TA: Tensor,
    experts_TA: Tensor,
    *,
    placed: ExpertMap,
    products: Products,
    shared: Shared | None = None,
    columns: Collectives | None = None,
) -> Steps[Mixed]:
    """Run each token through its experts, wherever they are, and return the weighted sum, and ``shared`` added to it.

    All ranks call it, each with its own tokens, or none. Where each expert's weights are spread over ranks too (tensor
    parallelism), products and ``shared`` return partial sums, and the caller adds up ``output_TH`` over those ranks. Or
    ``columns`` are those ranks: each row is summed over them first, and tokens' sums have the bits of whole experts.

    Shapes: x_TH [tokens, hidden]; weights_TA [tokens, chosen] float32; experts_TA [tokens, chosen] int64
    Raises: CommMisuse when shapes, map and group do not fit, or ranks disagree; as ``Work.wait``
    """
    check_choice(levels, x_TH, weights_TA, experts_TA, placed)
    added: list[Tensor] = []
    meanwhile = None if shared is None else lambda: added.append(shared())
    sent = yield from dispatch(levels, x_TH, weights_TA, experts_TA, placed=placed, meanwhile=meanwhile)
    results_KH = products(sent.rows_KH, sent.counts_S)
    if columns is not None:
        results_KH = yield columns.all_reduce(results_KH.float())
    output_TH = yield from combine(sent, results_KH, weights_TA)
    for shared_TH in added:
        output_TH += shared_TH
    return Mixed(output_TH=output_TH, load_E=count_by_expert(experts_TA.flatten(), placed.num_experts))


def dispatch(
    levels: Sequence[Collectives],
    x_TH: Tensor,
    weights_TA: Tensor,
    experts_TA: Tensor,
    *,
    placed: ExpertMap,
    meanwhile: Callable[[], None] | None = None,
) -> Steps[Dispatched]:
    """Bring each token to its experts; get the rows for one's own. ``meanwhile`` runs while rows are on their way.

    Shapes: x_TH [tokens, hidden], of any type; weights_TA [tokens, chosen] float32; experts_TA [tokens, chosen] int64
    Raises: as ``mix``
    """
    rank, ranks = place_in(levels)
    chosen, slots_per_rank = experts_TA.shape[1], placed.slots_per_rank
    slot_TA = placed.slots_NE[rank].index_select(0, experts_TA.flatten()).view_as(experts_TA)
    leaving = outgoing(x_TH, weights_TA, slot_TA, slots_per_rank=slots_per_rank, rank=rank)
    rows_RB, entries = leaving.rows_TB, leaving.entries
    arrivals: list[Arrival] = []
    behind = ranks
    for level in levels:
        behind //= level.size
        arrival = yield from hop(
            level,
            rows_RB,
            entries,
            width=behind * (slots_per_rank + 1),
            digest=placed.digest,
            meanwhile=None if arrivals else meanwhile,
        )
        arrivals.append(arrival)
        rows_RB, entries = arrival.rows_RH, arrival.entries
    arrived = expanded(rows_RB, entries, chosen=chosen, slots_per_rank=slots_per_rank)
    # Experts see rows by origin, whichever way they came: so a product that rounds by a row's company gives the same
    # bits as on one rank with all tokens.
    order_K = torch.argsort(arrived.slot_E * ranks + arrived.origin_E, stable=True)
    if chosen > 1:
        rows_RB = rows_RB[:, : -choice_bytes(chosen)]
    rows_KB = gather(rows_RB, arrived.row_E.index_select(0, order_K))
    return Dispatched(
        rows_KH=rows_KB.view(x_TH.dtype),
        counts_S=count_by_expert(arrived.slot_E, slots_per_rank),
        order_K=order_K,
        arrived=arrived,
        arrivals=tuple(arrivals),
        whole_T=leaving.whole_T,
    )


def combine(sent: Dispatched, results_KH: Tensor, weights_TA: Tensor) -> Steps[Tensor]:
    """Bring what experts made of rows back to the tokens' ranks; get this rank's tokens' weighted sums.

    Shapes: results_KH [entries, hidden], as ``rows_KH`` was; weights_TA [tokens, chosen] float32, as dispatched;
    returns [tokens, hidden]
    Raises: CommMisuse when there are more or fewer results than rows; as ``Work.wait``
    """
    if len(results_KH) != len(sent.rows_KH):
        raise misuse(
            sent.arrivals[-1].group, f"the experts made {len(results_KH)} rows of {len(sent.rows_KH)}; one each is due"
        )
    back_KH = folded(unsort(results_KH, sent.order_K), sent.arrived)
    for arrival in reversed(sent.arrivals):
        back_KH = yield from hop_back(arrival, back_KH)
    return restored(back_KH, weights_TA, sent.whole_T)


def check_choice(
    levels: Sequence[Collectives], x_TH: Tensor, weights_TA: Tensor, experts_TA: Tensor, placed: ExpertMap
) -> None:
    """Raise CommMisuse unless tokens, weights, experts, map and group fit."""
    _, ranks = place_in(levels)
    tokens = x_TH.shape[0]
    if placed.ranks != ranks:
        raise misuse(levels[0], f"the map of experts is for {placed.ranks} ranks, the levels have {ranks}")
    if experts_TA.shape != weights_TA.shape or experts_TA.dim() != 2 or experts_TA.shape[0] != tokens:
        raise misuse(
            levels[0],
            f"{tokens} tokens need weights and experts [{tokens}, chosen], "
            f"got {list(weights_TA.shape)} and {list(experts_TA.shape)}",
        )
    if experts_TA.shape[1] == 0 or experts_TA.dtype != torch.int64 or weights_TA.dtype != torch.float32:
        raise misuse(
            levels[0],
            f"at least one expert per token as int64, and float32 weights, are due; got {experts_TA.shape[1]} "
            f"as {experts_TA.dtype}, and {weights_TA.dtype}",
        )


def gather(rows_RH: Tensor, index_K: Tensor) -> Tensor:
    """Return rows by index, whatever their type.

    Shapes: rows_RH [rows, hidden]; index_K [entries] int64
    """
    return movable(rows_RH).index_select(0, index_K).view(rows_RH.dtype)
