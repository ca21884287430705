"""The exchange of ``experts`` in fixed shapes: no count is read back from a GPU, so it can be recorded as a graph.

Each pair of ranks has room for a bounded number of rows and entries, and always sends all of it. What does not fit
makes the whole step void, on all ranks: it is reported, with the room that would have been enough, and
``padded_or_exact`` runs the step again in exact shapes. A recorded graph holds the tables of the map that it was
recorded with: another map needs another graph.

One level only: room is sent whether it is used or not, so relaying it would cost twice.

Shapes: T tokens, H hidden size, A chosen experts per token, K = T * A entries, E experts, S slots of a rank, N ranks,
P places for rows and Q places for entries, of all ranks together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.moe_combine import weighted_sum
from ..kernels.moe_sort import count_by_expert, unsort
from .collectives import Collectives
from .expert_hop import Together, misuse, movable
from .expert_map import ExpertMap
from .experts import Mixed, Products, Shared, check_choice, gather, mix
from .overlap import Steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How many rows and entries one rank can send another in a step; the same on all ranks.

    ``rows = tokens``, ``entries = tokens * min(chosen, slots_per_rank)`` is always enough.

    Raises: ValueError naming what is below 1
    """

    rows: int
    entries: int

    def __post_init__(self) -> None:
        for name in ("rows", "entries"):
            if getattr(self, name) < 1:
                raise ValueError(f"room for {name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedMix:
    """What a padded exchange came to. Nothing in it means anything before ``fits`` has said so.

    Shapes: routed_TH [tokens, hidden]; load_E [experts] int64; agreed_4 [4] int64, over all ranks: the rows and the
    entries that the fullest pair needed, the largest and the negated smallest digest of their maps
    """

    routed_TH: Tensor
    load_E: Tensor
    agreed_4: Tensor
    room: Room


def fits(mixed: PaddedMix, group: Collectives) -> tuple[bool, Room]:
    """Return whether a padded exchange had room enough, on every rank, and the room that it needed.

    The one place where the host waits for the device. All ranks get the same answer.

    Raises: CommMisuse when ranks used different maps of experts
    """
    rows, entries, largest, negated_smallest = mixed.agreed_4.tolist()
    if largest != -negated_smallest:
        raise misuse(group, "ranks use different maps of experts; switch maps on all ranks before a step")
    needed = Room(rows=max(1, rows), entries=max(1, entries))
    return rows <= mixed.room.rows and entries <= mixed.room.entries, needed


def mix_padded(
    group: Collectives,
    x_TH: Tensor,
    weights_TA: Tensor,
    experts_TA: Tensor,
    *,
    placed: ExpertMap,
    products: Products,
    room: Room,
    meanwhile: Callable[[], None] | None = None,
) -> Steps[PaddedMix]:
    """Do as ``experts.mix`` does, in shapes that depend on the number of tokens and on ``room`` alone.

    ``products`` gets all places for entries; those behind the last counted one are padding. It must not read counts
    back either, if the exchange is to be recorded.

    Shapes: as ``experts.mix``
    Raises: as ``experts.mix``, but ranks that do not agree are left to ``fits``
    """
    check_choice((group,), x_TH, weights_TA, experts_TA, placed)
    load_E = count_by_expert(experts_TA.flatten(), placed.num_experts)
    outgoing = _lay_out(x_TH, experts_TA, placed.slots_NE[group.rank], placed, room)
    agreeing = group.all_reduce(outgoing.agreed_4, op="max")
    each_rows, each_entries = ((count,) * group.size for count in (room.rows, room.entries))
    listing = group.all_to_all(outgoing.codes_Q2, send_counts=each_entries, receive_counts=each_entries)
    moving = group.all_to_all(outgoing.rows_PH, send_counts=each_rows, receive_counts=each_rows)
    if meanwhile is not None:
        meanwhile()
    rows_PH = (yield Together((agreeing, listing, moving))).view(x_TH.dtype)
    row_Q, slot_Q = _arrived(listing.wait(), placed.slots_per_rank, room)
    order_Q = torch.argsort(slot_Q, stable=True)
    counts_S = count_by_expert(slot_Q, placed.slots_per_rank + 1)[:-1]
    results_QH = products(gather(rows_PH, row_Q.index_select(0, order_Q)), counts_S)
    if len(results_QH) != len(order_Q):
        raise misuse(group, f"the experts made {len(results_QH)} rows of {len(order_Q)}; one each is due")
    returned_QH = yield group.all_to_all(
        movable(unsort(results_QH, order_Q)), send_counts=each_entries, receive_counts=each_entries
    )
    by_choice_KH = gather(returned_QH.view(results_QH.dtype), outgoing.place_K)
    routed_TH = weighted_sum(by_choice_KH.view(*experts_TA.shape, by_choice_KH.shape[1]), weights_TA)
    return PaddedMix(routed_TH=routed_TH, load_E=load_E, agreed_4=agreeing.wait(), room=room)


def padded_or_exact(
    group: Collectives,
    x_TH: Tensor,
    weights_TA: Tensor,
    experts_TA: Tensor,
    *,
    placed: ExpertMap,
    products: Products,
    room: Room,
    levels: Sequence[Collectives] | None = None,
    shared: Shared | None = None,
    overflowed: Callable[[Room], None] | None = None,
) -> Steps[Mixed]:
    """Do as ``experts.mix`` does: padded if there is room, otherwise exact, over ``levels`` if given.

    ``overflowed`` is told the room that would have been enough. All ranks take the same way.

    Shapes: as ``experts.mix``
    Raises: as ``experts.mix``
    """
    added: list[Tensor] = []
    meanwhile = None if shared is None else lambda: added.append(shared())
    padded = yield from mix_padded(
        group, x_TH, weights_TA, experts_TA, placed=placed, products=products, room=room, meanwhile=meanwhile
    )
    enough, needed = fits(padded, group)
    if enough:
        routed_TH = padded.routed_TH
    else:
        if overflowed is not None:
            overflowed(needed)
        exact = yield from mix(levels or (group,), x_TH, weights_TA, experts_TA, placed=placed, products=products)
        routed_TH = exact.output_TH
    for shared_TH in added:
        routed_TH += shared_TH
    return Mixed(output_TH=routed_TH, load_E=padded.load_E)


@dataclass(frozen=True, slots=True)
class _Outgoing:
    """A rank's tokens, laid out for sending.

    Shapes: rows_PH [places for rows, hidden]; codes_Q2 [places for entries, 2] int32: row and slot, -1 for none;
    place_K [entries] int64, each entry's place; agreed_4 as in ``PaddedMix``
    """

    rows_PH: Tensor
    codes_Q2: Tensor
    place_K: Tensor
    agreed_4: Tensor


def _lay_out(x_TH: Tensor, experts_TA: Tensor, slot_E: Tensor, placed: ExpertMap, room: Room) -> _Outgoing:
    tokens, chosen = experts_TA.shape
    ranks = placed.ranks
    slot_K = slot_E.index_select(0, experts_TA.flatten())
    rank_K = torch.div(slot_K, placed.slots_per_rank, rounding_mode="floor")
    token_K = torch.arange(tokens, device=x_TH.device).repeat_interleave(chosen, output_size=tokens * chosen)
    # Places of rows: a token's number among those for the same rank. Beyond the room, all share one spare place.
    wanted_TN = torch.zeros((tokens, ranks), dtype=torch.int64, device=x_TH.device)
    wanted_TN.index_put_((token_K, rank_K), torch.ones_like(rank_K))
    nth_TN = wanted_TN.cumsum(0) - 1
    place_TN = torch.arange(ranks, device=x_TH.device) * room.rows + nth_TN
    spare_row = ranks * room.rows
    place_TN = place_TN.masked_fill((wanted_TN == 0) | (nth_TN >= room.rows), spare_row)
    token_P = torch.zeros(spare_row + 1, dtype=torch.int64, device=x_TH.device)
    token_TN = torch.arange(tokens, device=x_TH.device)[:, None].expand(tokens, ranks)
    token_P.scatter_(0, place_TN.flatten(), token_TN.flatten())
    # Places of entries, in the same way.
    to_rank_KN = (rank_K[:, None] == torch.arange(ranks, device=x_TH.device)).to(torch.int64)
    nth_K = (to_rank_KN.cumsum(0) - 1).gather(1, rank_K[:, None])[:, 0]
    spare_entry = ranks * room.entries
    place_K = (rank_K * room.entries + nth_K).masked_fill(nth_K >= room.entries, spare_entry)
    row_K = nth_TN[token_K, rank_K].clamp(max=room.rows - 1)
    codes_Q2 = torch.full((spare_entry + 1, 2), -1, dtype=torch.int32, device=x_TH.device)
    codes_K2 = torch.stack([row_K, slot_K % placed.slots_per_rank], dim=1).to(torch.int32)
    codes_Q2.index_copy_(0, place_K, codes_K2)
    return _Outgoing(
        rows_PH=_rows(x_TH, token_P[:-1]),
        codes_Q2=codes_Q2[:-1],
        place_K=place_K.clamp(max=spare_entry - 1),
        agreed_4=_to_agree(wanted_TN.sum(0), to_rank_KN.sum(0), placed.digest),
    )


def _rows(x_TH: Tensor, token_P: Tensor) -> Tensor:
    if x_TH.shape[0] == 0:
        return movable(x_TH).new_zeros((token_P.shape[0], x_TH.shape[1]))
    return movable(x_TH).index_select(0, token_P)


def _to_agree(rows_N: Tensor, entries_N: Tensor, digest: int) -> Tensor:
    """Return what the ranks take the maximum of; digests are equal where the largest is also the smallest."""
    digests_2 = torch.stack([torch.full_like(rows_N[0], digest), torch.full_like(rows_N[0], -digest)])
    return torch.cat([torch.stack([rows_N.max(), entries_N.max()]), digests_2])


def _arrived(codes_Q2: Tensor, slots_per_rank: int, room: Room) -> tuple[Tensor, Tensor]:
    """Return each entry's row among all that arrived, and its slot; padding is in a slot behind the last.

    So is what another map sent to a slot that is not here: ``fits`` will say so.
    """
    row_Q, slot_Q = codes_Q2.to(torch.int64).unbind(1)
    sender_Q = torch.div(torch.arange(len(row_Q), device=row_Q.device), room.entries, rounding_mode="floor")
    nowhere_Q = (slot_Q < 0) | (slot_Q >= slots_per_rank)
    return sender_Q * room.rows + row_Q.masked_fill(nowhere_Q, 0), slot_Q.masked_fill(nowhere_Q, slots_per_rank)
