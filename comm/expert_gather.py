"""A mixture of experts over ranks that all hold all tokens: each computes its experts' rows, and all rows are gathered.

The other way beside ``experts``, for the same placement and weights. No token travels, because every rank has them
all; what travels is first who chose what, then each expert's rows, to every rank. That is two exchanges, one behind the
other, where ``experts`` and the gathering of its outputs need four: with few tokens a step that is what counts. With
many the bytes do, and here every rank gets each of a token's rows.

The same bits as ``experts``: each rank routes its share of the tokens, an expert sees its rows in the order of ranks
and tokens, and sums run in float32 in the order of a token's choices.

Shapes: T tokens, W tokens of a rank's share, H hidden size, A chosen experts per token, K = T * A entries, N ranks,
S slots of a rank, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.moe_combine import weighted_sum
from ..kernels.moe_sort import count_by_expert, unsort
from .collectives import Collectives
from .expert_hop import misuse
from .expert_map import ExpertMap
from .experts import Products, check_choice, gather
from .level_gather import gather_counted_rows, gather_rows, place_in
from .overlap import Parts

_DIGEST_BITS = 0x7FFFFFFF
"""What of a map's digest fits an int32."""


def share_of(tokens: int, rank: int, ranks: int) -> slice:
    """Return a rank's share of the tokens: as many as any other's, but for the last ranks, which may have fewer."""
    widest = -(-tokens // ranks)
    return slice(rank * widest, (rank + 1) * widest)


def mix_gathered(
    levels: Sequence[Collectives],
    x_TH: Tensor,
    weights_WA: Tensor,
    experts_WA: Tensor,
    *,
    placed: ExpertMap,
    products: Products,
    columns: Collectives | None = None,
) -> Parts:
    """Run each token through its experts, wherever they are; return all tokens' weighted sums, on every rank.

    ``levels``, ``products`` and ``columns`` as of ``experts.mix``; weights and experts are of this rank's ``share_of``
    the tokens.

    Shapes: x_TH [tokens, hidden], the same on all ranks, at least one; weights_WA [share, chosen] float32;
    experts_WA [share, chosen] int64; returns [tokens, hidden]
    Raises: CommMisuse on every rank when their maps differ; as ``Work.wait``
    """
    rank, ranks = place_in(levels)
    tokens, chosen = x_TH.shape[0], experts_WA.shape[1]
    check_choice(levels, x_TH[share_of(tokens, rank, ranks)], weights_WA, experts_WA, placed)
    routed = _encode(weights_WA, experts_WA, rows=-(-tokens // ranks), digest=placed.digest & _DIGEST_BITS)
    weights_TA, experts_TA = _decode((yield from gather_rows(levels, routed)), levels, tokens, placed)
    slot_K = _slots(experts_TA, placed, ranks)
    # Slots count through the ranks, so sorted by slot each rank's entries stand together, in the order of ranks.
    order_K = torch.argsort(slot_K, stable=True)
    counts_NS = count_by_expert(slot_K, ranks * placed.slots_per_rank).view(ranks, placed.slots_per_rank)
    counts_N = counts_NS.sum(1).tolist()
    first = sum(counts_N[:rank])
    own_K = order_K[first : first + counts_N[rank]]
    results_KH = products(gather(x_TH, torch.div(own_K, chosen, rounding_mode="floor")), counts_NS[rank])
    if len(results_KH) != len(own_K):
        raise misuse(levels[-1], f"the experts made {len(results_KH)} rows of {len(own_K)}; one each is due")
    if columns is not None:
        results_KH = yield columns.all_reduce(results_KH.float())
    all_KH = yield from gather_counted_rows(levels, results_KH, counts_N)
    by_choice_KH = unsort(all_KH, order_K)
    return weighted_sum(by_choice_KH.view(tokens, chosen, by_choice_KH.shape[1]), weights_TA)


def _encode(weights_WA: Tensor, experts_WA: Tensor, *, rows: int, digest: int) -> Tensor:
    """Return a share's choices as they travel: the bits of weights, experts, the digest of the map.

    Shapes: returns [rows, 2 * chosen + 1] int32
    """
    share, chosen = experts_WA.shape
    routed = torch.full((rows, 2 * chosen + 1), digest, dtype=torch.int32, device=experts_WA.device)
    routed[:share, :chosen] = weights_WA.contiguous().view(torch.int32)
    routed[:share, chosen:-1] = experts_WA
    return routed


def _decode(routed: Tensor, levels: Sequence[Collectives], tokens: int, placed: ExpertMap) -> tuple[Tensor, Tensor]:
    """Return all tokens' weights and experts; all ranks see the same digests, and raise together."""
    if not bool((routed[:, -1] == placed.digest & _DIGEST_BITS).all()):
        raise misuse(levels[0], "a rank uses another map of experts; switch maps on all ranks before a step")
    chosen = routed.shape[1] // 2
    weights_TA = routed[:tokens, :chosen].contiguous().view(torch.float32)
    return weights_TA, routed[:tokens, chosen:-1].to(torch.int64)


def _slots(experts_TA: Tensor, placed: ExpertMap, ranks: int) -> Tensor:
    """Return the slot of each entry: the one that the rank uses which has the token in its share."""
    tokens = experts_TA.shape[0]
    origin_T = torch.div(torch.arange(tokens, device=experts_TA.device), -(-tokens // ranks), rounding_mode="floor")
    return placed.slots_NE[origin_T[:, None], experts_TA].flatten()
