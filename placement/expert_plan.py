"""Where a replica's experts are at first, and where next: the policies put together.

Owns which policy is used when. Where the ranks are on several hosts and the experts divide among these, an expert's
replicas stay on one host, from the first placement on; otherwise they may be anywhere.

- ``balance``: every rank has as much to do; hierarchical where replicas stay on hosts, global otherwise.
- ``affinity``: experts that the same tokens choose are on one host, and there on one rank, as far as ranks stay about
  as balanced. A layer is changed only when that brings a good part more of these choices together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .expert_affinity import place_by_affinity
from .expert_balance import balance_globally, balance_hierarchically, rank_loads
from .expert_moves import TOLERANCE, Rebalance, in_place, moves_between, rebalance, renamed
from .experts import ExpertPlacement, round_robin

POLICIES = ("balance", "affinity")

GAIN = 0.05
"""The part of all choices of pairs that a layer's next placement has to bring together more than the present one."""

Pairs = Sequence[Sequence[float]]
"""Tokens that chose both of two experts. [experts][experts]; the diagonal means nothing"""


def first_placement(num_experts: int, num_ranks: int, *, ranks_per_host: int, spare_slots: int) -> ExpertPlacement:
    """Return where one layer's experts are before anything is known of loads.

    ``spare_slots`` beyond one an expert, over all ranks; filled up so that every rank has as many.
    """
    num_slots = -(-(num_experts + spare_slots) // num_ranks) * num_ranks
    num_hosts = num_ranks // ranks_per_host
    if num_hosts == 1 or num_experts % num_hosts:
        num_slots = min(num_slots, num_experts * num_ranks)
        return round_robin(num_experts, num_ranks, ranks_per_host=ranks_per_host, num_slots=num_slots)
    num_slots = min(num_slots, num_experts * ranks_per_host)
    own = round_robin(num_experts // num_hosts, ranks_per_host, num_slots=num_slots // num_hosts)
    ranks = [
        [expert * num_hosts + host for expert in experts]
        for host in range(num_hosts)
        for experts in own.experts_by_rank(0)
    ]
    return ExpertPlacement.of_ranks([ranks], num_experts=num_experts, ranks_per_host=ranks_per_host)


def next_placement(
    present: ExpertPlacement,
    loads: Sequence[Sequence[float]],
    *,
    pairs: Callable[[int], Pairs] | None = None,
) -> Rebalance:
    """Return the placement to go to, and what has to travel for it: by affinity where ``pairs`` are given.

    ``pairs`` returns one layer's: all of them at once would be much memory.

    Shapes: loads [layers][experts]
    """
    if pairs is not None:
        layers = [_regrouped(present, layer, own, pairs(layer)) for layer, own in enumerate(loads)]
        placement = ExpertPlacement.of_ranks(
            layers, num_experts=present.num_experts, ranks_per_host=present.ranks_per_host
        )
        return Rebalance(placement=placement, moves=moves_between(present, placement))
    slots, ranks, per_host = present.num_slots, present.num_ranks, present.ranks_per_host
    if keeps_replicas_on_hosts(present):
        wanted = balance_hierarchically(loads, num_slots=slots, num_ranks=ranks, ranks_per_host=per_host)
        return rebalance(present, wanted, loads, inside_hosts=True)
    wanted = balance_globally(loads, num_slots=slots, num_ranks=ranks, ranks_per_host=per_host)
    return rebalance(present, wanted, loads)


def keeps_replicas_on_hosts(placement: ExpertPlacement) -> bool:
    """Return whether there are hosts among which experts divide, and every expert is on one of them only."""
    hosts, per_host = placement.num_hosts, placement.ranks_per_host
    if hosts == 1 or placement.num_experts % hosts or placement.num_slots > placement.num_experts * per_host:
        return False
    width = placement.slots_per_rank * per_host
    return all(slots[0] // width == slots[-1] // width for layer in placement.logical_to_physical for slots in layer)


def _regrouped(present: ExpertPlacement, layer: int, loads: Sequence[float], pairs: Pairs) -> list[list[int]]:
    """Return the experts of every rank in one layer: grouped anew, or as they are where that gains little."""
    before = [list(experts) for experts in present.experts_by_rank(layer)]
    own = ExpertPlacement.of_ranks([before], num_experts=present.num_experts, ranks_per_host=present.ranks_per_host)
    wanted = place_by_affinity(
        [pairs],
        [loads],
        num_slots=own.num_slots,
        num_ranks=own.num_ranks,
        # Where replicas may be anywhere, the ranks are one large host.
        ranks_per_host=own.ranks_per_host if keeps_replicas_on_hosts(own) else own.num_ranks,
    )
    after = [list(experts) for experts in wanted.experts_by_rank(0)]
    even_enough = max(rank_loads(own, 0, loads)) <= max(rank_loads(wanted, 0, loads)) * (1 + TOLERANCE)
    if even_enough and not _gains(before, after, own.ranks_per_host, pairs):
        return before
    chosen = renamed(before, after, own.ranks_per_host)
    return [in_place(old, new) for old, new in zip(before, chosen, strict=True)]


def _gains(before: list[list[int]], after: list[list[int]], ranks_per_host: int, pairs: Pairs) -> bool:
    """Return whether a good part more of the choices of pairs meet, on a rank or on a host."""
    everything = sum(sum(row) - row[expert] for expert, row in enumerate(pairs)) / 2
    return any(
        _together(_parts(after, size), pairs) > _together(_parts(before, size), pairs) + GAIN * everything
        for size in {1, ranks_per_host}
    )


def _parts(ranks: list[list[int]], size: int) -> list[list[int]]:
    """Return the experts of every ``size`` neighbouring ranks."""
    return [
        [expert for experts in ranks[first : first + size] for expert in experts]
        for first in range(0, len(ranks), size)
    ]


def _together(parts: list[list[int]], pairs: Pairs) -> float:
    """Return the choices of two experts that meet in a part, if every replica takes an even share."""
    replicas = [0] * len(pairs)
    for part in parts:
        for expert in part:
            replicas[expert] += 1
    return sum(
        (pairs[one][other] + pairs[other][one]) / (2 * replicas[one] * replicas[other])
        for part in parts
        for index, one in enumerate(part)
        for other in part[index + 1 :]
        if one != other
    )
