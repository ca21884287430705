"""Placements that keep experts together which the same tokens choose, so that a token visits fewer hosts and ranks.

Owns the grouping: parts of equally many experts, with as many choices of pairs as possible inside the parts and no part
much heavier than balance alone would have it. First each part grows around its busiest expert, then single experts
change places. Deterministic: ties go to the lowest index.

Source: the idea of grouping by co-activation is Speculative MoE's (arXiv 2503.04398).
"""

from __future__ import annotations

from collections.abc import Sequence

from .expert_balance import TARGET, check_loads, place_among
from .expert_packing import even_out, pack
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
    """Place experts that fire together on the same host, and without spare slots on the same rank.

    With spare slots a host's experts are replicated and packed for balance on its ranks: between hosts the wire is
    slow, inside a host it is the heaviest rank that everybody waits for.

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
            if num_slots == num_experts:
                inner = [[pairs[one][other] for other in host] for one in host]
                parts = group_experts(inner, [own[expert] for expert in host], ranks_per_host, slack=slack)
                ranks += [[host[index] for index in part] for part in parts]
            else:
                ranks += place_among(
                    host, own, num_slots=num_slots // num_hosts, num_ranks=ranks_per_host, target=TARGET
                )
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
    # Counted both ways, and never with itself, whatever the caller counted.
    pull = [[together[a][b] + together[b][a] if a != b else 0.0 for b in range(experts)] for a in range(experts)]
    owners = range(experts)
    balanced = pack(loads, owners, num_parts, target=TARGET)
    limit = max(sum(loads[expert] for expert in part) for part in balanced) * (1 + slack)
    parts = _grow(pull, loads, num_parts, limit)
    if even_out(parts, loads, owners, limit=limit) > limit:
        parts = balanced
    return _improve(parts, pull, loads, limit)


def _grow(pull: list[list[float]], loads: Sequence[float], num_parts: int, limit: float) -> list[list[int]]:
    """Fill part after part with what its experts pull most, within the limit while anything fits."""
    size = len(loads) // num_parts
    left = set(range(len(loads)))
    parts = []
    for _ in range(num_parts):
        seed = max(sorted(left), key=lambda expert: sum([pull[expert][other] for other in left]))
        part, weight = [seed], loads[seed]
        left.remove(seed)
        towards = list(pull[seed])
        while len(part) < size:
            fitting = [expert for expert in sorted(left) if weight + loads[expert] <= limit]
            # Where nothing fits, the lightest: exchanges repair what that breaks.
            chosen = max(fitting, key=towards.__getitem__) if fitting else min(sorted(left), key=loads.__getitem__)
            part.append(chosen)
            weight += loads[chosen]
            left.remove(chosen)
            towards = [a + b for a, b in zip(towards, pull[chosen], strict=True)]
        parts.append(part)
    return parts


def _improve(parts: list[list[int]], pull: list[list[float]], loads: Sequence[float], limit: float) -> list[list[int]]:
    """Let every expert in turn change places with the one for which that gains most, until none gains."""
    part_of = [0] * len(loads)
    for index, part in enumerate(parts):
        for expert in part:
            part_of[expert] = index
    weights = [sum([loads[expert] for expert in part]) for part in parts]
    # towards[expert][part]: how often the expert is chosen with one of the part.
    towards = [[sum([row[expert] for expert in part]) for part in parts] for row in pull]
    # Gains below this are rounding.
    least = 1e-9 * max(map(sum, pull))
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
    for expert, index in enumerate(part_of):
        grouped[index].append(expert)
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
