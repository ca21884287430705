"""One hop of rows between the ranks of a group, and the way back of what became of them: exact, nothing is dropped.

A row goes once to each rank where something wants it, with a list of what: its entries. Counts are exchanged first, so
that every rank knows what it will get. Knows rows and places, not experts: ``experts`` chains hops.

Written as pieces for ``overlap``: each wait is a yield, during which a caller may compute something else.

Shapes: R rows, H hidden size, K entries, N ranks of the group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.moe_sort import sort_by_expert, unsort
from .collectives import Collectives, Work
from .errors import CommMisuse
from .overlap import Steps

HEADER = 4
"""int64 numbers from each rank to each, before anything else: rows, entries, and what they must agree on."""

ENTRY_BYTES = 8
"""Bytes of an entry on its way: two int32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """Which rows are wanted where: one entry for each row and place.

    Shapes: all [entries] int64: the row's index; the place, counted through the ranks of the hop and, inside a rank,
    as the next hop counts them; the rank, of all that take part, whose row it was first
    """

    row_K: Tensor
    place_K: Tensor
    origin_K: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """What reached a rank in one hop, by sender, and what the way back needs.

    Shapes: rows_RH [rows, hidden]; order_K [entries] int64, the order in which this rank's own entries left
    """

    rows_RH: Tensor
    entries: Entries
    group: Collectives
    order_K: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Together:
    """Works begun together, as one to wait for. The result is the last one's."""

    works: tuple[Work, ...]

    def wait(self, timeout_s: float | None = None) -> Tensor:
        """Wait for all, each as long as given."""
        return [work.wait(timeout_s) for work in self.works][-1]

    def done(self) -> bool:
        """Return whether all are complete; also so when the group is dead."""
        return all(work.done() for work in self.works)


def hop(
    group: Collectives,
    rows_RH: Tensor,
    entries: Entries,
    *,
    width: int,
    digest: int,
    meanwhile: Callable[[], None] | None = None,
) -> Steps[Arrival]:
    """Send each row to the ranks that want it: ``place // width`` is the rank, the rest is the place there.

    ``meanwhile`` runs while the rows are on their way. Entries arrive by sender; those of one sender in their order.

    Shapes: rows_RH [rows, hidden]
    Raises: CommMisuse when the ranks' digests or sizes of a row differ; as ``Work.wait``
    """
    num_rows = rows_RH.shape[0]
    rank_K = torch.div(entries.place_K, width, rounding_mode="floor")
    order_K, entries_N = sort_by_expert(rank_K, group.size)
    wanted_NR = torch.zeros((group.size, num_rows), dtype=torch.bool, device=rows_RH.device)
    wanted_NR[rank_K, entries.row_K] = True
    row_bytes = rows_RH.shape[1] * rows_RH.element_size()
    header_N4 = torch.stack([wanted_NR.sum(1), entries_N, *_constants(entries_N, digest, row_bytes)], dim=1)
    ones = (1,) * group.size
    counting = group.all_to_all(header_N4.contiguous(), send_counts=ones, receive_counts=ones)
    # The counts are on their way: what does not depend on them is laid out now.
    outgoing_RH = movable(rows_RH).index_select(0, wanted_NR.nonzero()[:, 1])
    codes_K2 = _encode(entries, wanted_NR, rank_K, order_K, width)
    headers_2N4 = torch.stack([header_N4, (yield counting)]).tolist()
    _check_headers(group, *headers_2N4)
    (sent_rows, sent), (received_rows, received) = (
        (tuple(line[0] for line in header), tuple(line[1] for line in header)) for header in headers_2N4
    )
    listing = group.all_to_all(codes_K2, send_counts=sent, receive_counts=received)
    moving = group.all_to_all(outgoing_RH, send_counts=sent_rows, receive_counts=received_rows)
    if meanwhile is not None:
        meanwhile()
    incoming_RH = yield Together((listing, moving))
    return Arrival(
        rows_RH=incoming_RH.view(rows_RH.dtype),
        entries=_decode(listing.wait(), received_rows, received, width),
        group=group,
        order_K=order_K,
        sent=sent,
        received=received,
    )


def hop_back(arrival: Arrival, results_KH: Tensor) -> Steps[Tensor]:
    """Return one row for each entry that arrived to where it came from; get one for each that was sent, in its order.

    Shapes: results_KH [entries that arrived, hidden]; returns [entries that were sent, hidden]
    """
    returned_KH = yield arrival.group.all_to_all(
        movable(results_KH), send_counts=arrival.received, receive_counts=arrival.sent
    )
    return unsort(returned_KH, arrival.order_K).view(results_KH.dtype)


def movable(rows_RH: Tensor) -> Tensor:
    """Return the rows as something that can be gathered and sent: types of 8 bits as bytes."""
    return rows_RH.view(torch.uint8) if rows_RH.element_size() == 1 else rows_RH


def misuse(group: Collectives, reason: str) -> CommMisuse:
    """Return the error of an exchange that cannot be carried out."""
    return CommMisuse(f"group {group.name}: exchange of experts at rank {group.rank} of {group.size}: {reason}")


def _constants(like_N: Tensor, *values: int) -> tuple[Tensor, ...]:
    return tuple(torch.full_like(like_N, value) for value in values)


def _encode(entries: Entries, wanted_NR: Tensor, rank_K: Tensor, order_K: Tensor, width: int) -> Tensor:
    """Return entries as they travel, sorted by rank: the row among those for that rank; origin and place in one."""
    row_K = (wanted_NR.cumsum(1) - 1)[rank_K, entries.row_K]
    place_K = entries.origin_K * width + entries.place_K % width
    return torch.stack([row_K, place_K], dim=1).index_select(0, order_K).to(torch.int32)


def _decode(codes_K2: Tensor, rows: tuple[int, ...], entries: tuple[int, ...], width: int) -> Entries:
    row_K, place_K = codes_K2.to(torch.int64).unbind(1)
    counts_2N = torch.tensor([rows, entries], device=codes_K2.device)
    first_N = counts_2N[0].cumsum(0) - counts_2N[0]
    return Entries(
        row_K=row_K + first_N.repeat_interleave(counts_2N[1], output_size=len(row_K)),
        place_K=place_K % width,
        origin_K=torch.div(place_K, width, rounding_mode="floor"),
    )


def _check_headers(group: Collectives, sent: list[list[int]], received: list[list[int]]) -> None:
    """Raise unless all ranks agree; all of them see the same headers, and raise together."""
    _, _, digest, row_bytes = sent[group.rank]
    for rank, (rows, entries, their_digest, their_row_bytes) in enumerate(received):
        if their_digest != digest:
            raise misuse(group, f"rank {rank} uses another map of experts; switch maps on all ranks before a step")
        if their_row_bytes != row_bytes:
            raise misuse(group, f"rank {rank} sends rows of {their_row_bytes} bytes, this rank of {row_bytes}")
        if not 0 <= rows <= entries or (rows == 0) != (entries == 0):
            raise misuse(group, f"rank {rank} announces {rows} rows for {entries} entries")
