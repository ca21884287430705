"""Placements that keep experts together which the same tokens choose, so that a token visits fewer hosts and ranks.

Owns the grouping: parts of equally many experts, with as many choices of pairs as possible inside the parts and no part
much heavier than balance alone would have it. First each part grows around its busiest expert, then single experts
change places. Deterministic: ties go to the lowest index.

Source: the idea of grouping by co-activation is Speculative MoE's (arXiv 2503.04398).
"""

from __future__ import annotations

from collections.abc import Sequence

from .expert_balance import TARGET, check_loads
from .expert_packing import even_out, pack, replica_counts
from .experts import ExpertPlacement, check_ranks, check_slots

SLACK = 0.1
"""How much heavier than balance alone a part may be, by default."""

MOST_PASSES = 20
"""Bounds the search for better places; a handful is common."""


def place_by_affinity(
    together: Sequence[Sequence[Sequence[float]]],
    loads: Sequence[Sequence[float]],
    *,
    num_slots: int,
    num_ranks: int,
    ranks_per_host: int,
    slack: float = SLACK,
) -> ExpertPlacement:
    """Place experts that fire together on the same host, and inside it on the same rank.

    Spare slots hold replicas of the heaviest experts of each host, on other ranks of the same host.

    Shapes: together [layers][experts][experts], tokens that chose both; loads [layers][experts]
    Raises: ValueError naming the argument that cannot be
    """
    num_experts = check_loads(loads)
    check_ranks(num_ranks=num_ranks, ranks_per_host=ranks_per_host)
    check_slots(num_slots=num_slots, num_experts=num_experts, num_ranks=num_ranks)
    num_hosts = num_ranks // ranks_per_host
    if num_experts % num_hosts:
        raise ValueError(f"ranks_per_host must give hosts that divide the {num_experts} experts, got {num_hosts} hosts")
    if num_slots > num_experts * ranks_per_host:
        raise ValueError(
            f"num_slots must be at most {num_experts} experts times the {ranks_per_host} ranks of a host, "
            f"got {num_slots}: replicas stay on one host"
        )
    if len(together) != len(loads):
        raise ValueError(f"together must have {len(loads)} layers as loads, got {len(together)}")
    layers = []
    for pairs, own in zip(together, loads, strict=True):
        ranks: list[list[int]] = []
        for host in group_experts(pairs, own, num_hosts, slack=slack):
            inner = [[pairs[one][other] for other in host] for one in host]
            counts = replica_counts([own[expert] for expert in host], num_slots // num_hosts, most=ranks_per_host)
            parts = _group(inner, [own[expert] for expert in host], counts, ranks_per_host, slack)
            ranks += [sorted([host[index] for index in part]) for part in parts]
        layers.append(ranks)
    return ExpertPlacement.of_ranks(layers, num_experts=num_experts, ranks_per_host=ranks_per_host)


def group_experts(
    together: Sequence[Sequence[float]], loads: Sequence[float], num_parts: int, *, slack: float = SLACK
) -> list[list[int]]:
    """Split experts into parts of equal size that fire together, none heavier than balance by more than ``slack``.

    Shapes: together [experts][experts]; loads [experts]; returns [num_parts][experts / num_parts], ascending
    """
    experts = len(loads)
    if num_parts < 1 or experts % num_parts:
        raise ValueError(f"num_parts must divide the {experts} experts, got {num_parts}")
    if slack < 0:
        raise ValueError(f"slack must not be negative, got {slack}")
    if len(together) != experts or any(len(row) != experts for row in together):
        raise ValueError(f"together must be {experts} by {experts}")
    return [sorted(part) for part in _group(together, loads, [1] * experts, num_parts, slack)]


def _group(
    together: Sequence[Sequence[float]], loads: Sequence[float], counts: Sequence[int], num_parts: int, slack: float
) -> list[list[int]]:
    """Split the replicas of some experts into parts; return the experts of every part, none twice in one.

    Shapes: together [experts][experts]; loads, counts (replicas) [experts]
    """
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    shares = [loads[expert] / counts[expert] for expert in owners]
    pull = _pull(together, counts, owners)
    balanced = pack(shares, owners, num_parts, target=TARGET)
    limit = max(sum([shares[item] for item in part]) for part in balanced) * (1 + slack)
    parts = _grow(pull, shares, num_parts, limit)
    heaviest = even_out(parts, shares, owners, limit=limit)
    if heaviest > limit or any(len({owners[item] for item in part}) < len(part) for part in parts):
        parts = balanced
    return [[owners[item] for item in part] for part in _improve(parts, pull, shares, limit)]


def _pull(together: Sequence[Sequence[float]], counts: Sequence[int], owners: Sequence[int]) -> list[list[float]]:
    """Return how much each two replicas belong together: as often as a token that chose both experts meets both.

    Replicas of one expert repel each other more than everything else attracts.
    """
    repulsion = -2.0 * (1 + sum(map(sum, together)))
    # Counted both ways, whatever the caller counted.
    pull = [
        [
            repulsion if one == other else (together[one][other] + together[other][one]) / (counts[one] * counts[other])
            for other in owners
        ]
        for one in owners
    ]
    for item, row in enumerate(pull):
        row[item] = 0.0
    return pull


def _grow(pull: list[list[float]], loads: Sequence[float], num_parts: int, limit: float) -> list[list[int]]:
    """Fill part after part with what its items pull most, within the limit while anything fits."""
    size = len(loads) // num_parts
    left = set(range(len(loads)))
    parts = []
    for _ in range(num_parts):
        seed = max(sorted(left), key=lambda item: sum([pull[item][other] for other in left if pull[item][other] > 0]))
        part, weight = [seed], loads[seed]
        left.remove(seed)
        towards = list(pull[seed])
        while len(part) < size:
            fitting = [item for item in sorted(left) if weight + loads[item] <= limit]
            # Where nothing fits, the lightest: exchanges repair what that breaks.
            chosen = max(fitting, key=towards.__getitem__) if fitting else min(sorted(left), key=loads.__getitem__)
            part.append(chosen)
            weight += loads[chosen]
            left.remove(chosen)
            towards = [a + b for a, b in zip(towards, pull[chosen], strict=True)]
        parts.append(part)
    return parts


def _improve(parts: list[list[int]], pull: list[list[float]], loads: Sequence[float], limit: float) -> list[list[int]]:
    """Let every item in turn change places with the one for which that gains most, until none gains."""
    part_of = [0] * len(loads)
    for index, part in enumerate(parts):
        for item in part:
            part_of[item] = index
    weights = [sum([loads[item] for item in part]) for part in parts]
    # towards[item][part]: how often the item's tokens meet one of the part.
    towards = [[sum([row[item] for item in part]) for part in parts] for row in pull]
    # Gains below this are rounding.
    least = 1e-9 * max(map(max, pull))
    for _ in range(MOST_PASSES):
        changed = False
        for one in range(len(loads)):
            other = _best_partner(one, part_of, weights, towards, pull, loads, limit, least)
            if other is None:
                continue
            here, there = part_of[one], part_of[other]
            part_of[one], part_of[other] = there, here
            weights[here] += loads[other] - loads[one]
            weights[there] += loads[one] - loads[other]
            for row, of_one, of_other in zip(towards, pull[one], pull[other], strict=True):
                row[here] += of_other - of_one
                row[there] += of_one - of_other
            changed = True
        if not changed:
            break
    grouped: list[list[int]] = [[] for _ in parts]
    for item, index in enumerate(part_of):
        grouped[index].append(item)
    return grouped


def _best_partner(
    one: int,
    part_of: list[int],
    weights: list[float],
    towards: list[list[float]],
    pull: list[list[float]],
    loads: Sequence[float],
    limit: float,
    least: float,
) -> int | None:
    here = part_of[one]
    own, pulled, load = towards[one], pull[one], loads[one]
    best, most = None, least
    for other, there in enumerate(part_of):
        if there == here:
            continue
        row = towards[other]
        gain = own[there] - own[here] + row[here] - row[there] - 2 * pulled[other]
        if gain > most:
            shift = loads[other] - load
            # A part that is above the limit already may only become lighter.
            if (shift <= 0 or weights[here] + shift <= limit) and (shift >= 0 or weights[there] - shift <= limit):
                best, most = other, gain
    return best
