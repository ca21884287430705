"""From one placement to the next with few experts on the wire, and the list of what has to travel.

A better placement is worth only what it gains until loads change again, and every expert that moves is megabytes. So a
layer stays as it is while the wanted placement gains little; else it is either repaired in place, a replica or an
exchange at a time, or replaced by the wanted one with its ranks renamed to fit, whichever moves fewer experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .expert_balance import check_loads, rank_loads
from .expert_repair import Repair
from .experts import ExpertPlacement

TOLERANCE = 0.05
"""How much heavier than wanted the heaviest rank may stay, by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """An expert's weights in one layer, from a rank that has them to a slot of a rank that has not."""

    layer: int
    expert: int
    source: int
    destination: int
    slot: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebalance:
    """The next placement and what has to travel for it."""

    placement: ExpertPlacement
    moves: tuple[Move, ...]


def rebalance(
    present: ExpertPlacement,
    wanted: ExpertPlacement,
    loads: Sequence[Sequence[float]],
    *,
    tolerance: float = TOLERANCE,
    inside_hosts: bool = False,
) -> Rebalance:
    """Choose a placement nearly as balanced as ``wanted`` that moves few experts from ``present``.

    In every layer the heaviest rank is at most ``tolerance`` heavier than wanted. With ``inside_hosts`` a repair moves
    nothing between hosts, as the hierarchical policy needs where its groups are to stay on theirs.

    Shapes: loads [layers][experts]
    Raises: ValueError when the two placements are not of the same layers, experts, slots, ranks and hosts
    """
    _check_same_shape(present, wanted)
    if len(loads) != present.num_layers or check_loads(loads) != present.num_experts:
        raise ValueError(f"loads must be {present.num_layers} layers of {present.num_experts} experts")
    if tolerance < 0:
        raise ValueError(f"tolerance must not be negative, got {tolerance}")
    reach = present.ranks_per_host if inside_hosts else present.num_ranks
    layers = []
    for layer, own in enumerate(loads):
        before = [list(experts) for experts in present.experts_by_rank(layer)]
        limit = max(rank_loads(wanted, layer, own)) * (1 + tolerance)
        after = renamed(before, [list(experts) for experts in wanted.experts_by_rank(layer)], present.ranks_per_host)
        repair = Repair(before, own, reach)
        chosen = repair.ranks if repair.run(limit, most_moves=_arrivals(before, after)) else after
        layers.append([in_place(old, new) for old, new in zip(before, chosen, strict=True)])
    placement = ExpertPlacement.of_ranks(layers, num_experts=present.num_experts, ranks_per_host=present.ranks_per_host)
    return Rebalance(placement=placement, moves=moves_between(present, placement))


def moves_between(before: ExpertPlacement, after: ExpertPlacement) -> tuple[Move, ...]:
    """List the experts that ranks lack in ``before`` and hold in ``after``, each with a rank to have it from.

    Within a layer a move may fill a slot that another one reads, so a layer's experts are received beside the slots
    first. The source is on the same host where one has the expert; among equals the rank that has sent least so far.
    """
    _check_same_shape(before, after)
    sent = [0] * before.num_ranks
    moves = []
    for layer in range(before.num_layers):
        for rank, experts in enumerate(after.experts_by_rank(layer)):
            held = before.experts_on(layer, rank)
            for place, expert in enumerate(experts):
                if expert in held:
                    continue
                holders = [before.rank_of(slot) for slot in before.replicas(layer, expert)]
                home = before.host_of(rank)
                source = min(holders, key=lambda holder: (before.host_of(holder) != home, sent[holder], holder))
                sent[source] += 1
                slot = rank * after.slots_per_rank + place
                moves.append(Move(layer=layer, expert=expert, source=source, destination=rank, slot=slot))
    return tuple(moves)


def renamed(before: list[list[int]], after: list[list[int]], ranks_per_host: int) -> list[list[int]]:
    """Give the ranks of ``after`` new numbers, whole hosts first, so that many experts stay where they are."""

    def hosts(ranks: list[list[int]]) -> list[list[int]]:
        firsts = range(0, len(ranks), ranks_per_host)
        return [[expert for rank in ranks[first : first + ranks_per_host] for expert in rank] for first in firsts]

    found: list[list[int]] = []
    for host, other in enumerate(_matches(hosts(before), hosts(after))):
        own = before[host * ranks_per_host : (host + 1) * ranks_per_host]
        new = after[other * ranks_per_host : (other + 1) * ranks_per_host]
        found += [new[index] for index in _matches(own, new)]
    # The best matches one by one are not always the best together.
    return min((after, found), key=lambda ranks: _arrivals(before, ranks))


def in_place(old: Sequence[int], new: Sequence[int]) -> list[int]:
    """Order a rank's new experts so that those which stay keep their slots."""
    arriving = iter(sorted(set(new).difference(old)))
    return [expert if expert in new else next(arriving) for expert in old]


def _matches(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> list[int]:
    """Return for every part of ``before`` one of ``after``, those that share most first."""
    sets = [set(part) for part in before]
    shared = [(-len(held.intersection(part)), i, j) for i, held in enumerate(sets) for j, part in enumerate(after)]
    found: dict[int, int] = {}
    taken: set[int] = set()
    for _, i, j in sorted(shared):
        if i not in found and j not in taken:
            found[i] = j
            taken.add(j)
    return [found[i] for i in range(len(before))]


def _arrivals(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> int:
    return sum(len(set(new).difference(old)) for old, new in zip(before, after, strict=True))


def _check_same_shape(one: ExpertPlacement, other: ExpertPlacement) -> None:
    for name in ("num_experts", "num_ranks", "ranks_per_host", "num_layers", "num_slots"):
        if getattr(one, name) != getattr(other, name):
            raise ValueError(
                f"{name} must be the same in both placements, got {getattr(one, name)} and {getattr(other, name)}"
            )
