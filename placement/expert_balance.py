"""Placements that balance the experts' loads over the ranks, in two policies.

*Global*: any expert's replicas go to any ranks. *Hierarchical*: groups of experts are dealt to hosts first, and an
expert's replicas stay on its group's host, so that a router that picks few groups a token reaches few hosts. Both
assume that a replica carries an even share of its expert's load, which ``expert_routes`` sees to, as far as ranks
divide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .expert_packing import pack, replica_counts
from .expert_repair import Repair
from .experts import ExpertPlacement, check_ranks, check_slots

TARGET = 0.99
"""Mean over heaviest rank at which the search for better ends; what is left is less than loads change in a minute."""

MOST_MOVES = 32
"""Bounds what is tried beyond replicas first, places second: a layer in hundreds of slots takes some 50 ms more."""


def balance_globally(
    loads: Sequence[Sequence[float]],
    *,
    num_slots: int,
    num_ranks: int,
    ranks_per_host: int | None = None,
    target: float = TARGET,
) -> ExpertPlacement:
    """Place every expert anywhere so that the heaviest rank of each layer is as light as found.

    Shapes: loads [layers][experts]
    Raises: ValueError naming the argument that cannot be
    """
    num_experts = check_loads(loads)
    ranks_per_host = ranks_per_host or num_ranks
    check_ranks(num_ranks=num_ranks, ranks_per_host=ranks_per_host)
    check_slots(num_slots=num_slots, num_experts=num_experts, num_ranks=num_ranks)
    _check_target(target)
    experts = range(num_experts)
    layers = [place_among(experts, layer, num_slots=num_slots, num_ranks=num_ranks, target=target) for layer in loads]
    return ExpertPlacement.of_ranks(layers, num_experts=num_experts, ranks_per_host=ranks_per_host)


def balance_hierarchically(
    loads: Sequence[Sequence[float]],
    *,
    num_slots: int,
    num_ranks: int,
    ranks_per_host: int,
    num_groups: int | None = None,
    target: float = TARGET,
) -> ExpertPlacement:
    """Place groups of experts on hosts, then each host's experts on its ranks.

    Groups are consecutive experts, as many in each; without ``num_groups`` every expert is a group of its own.

    Shapes: loads [layers][experts]
    Raises: ValueError naming the argument that cannot be
    """
    num_experts = check_loads(loads)
    check_ranks(num_ranks=num_ranks, ranks_per_host=ranks_per_host)
    check_slots(num_slots=num_slots, num_experts=num_experts, num_ranks=num_ranks)
    _check_target(target)
    num_hosts = num_ranks // ranks_per_host
    num_groups = num_experts if num_groups is None else num_groups
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups must divide the {num_experts} experts, got {num_groups}")
    if num_groups % num_hosts:
        raise ValueError(f"num_groups must be a multiple of the {num_hosts} hosts, got {num_groups}")
    if num_slots > num_experts * ranks_per_host:
        raise ValueError(
            f"num_slots must be at most {num_experts} experts times the {ranks_per_host} ranks of a host, "
            f"got {num_slots}: replicas stay on one host"
        )
    size = num_experts // num_groups
    layers = []
    for layer in loads:
        group_loads = [sum(layer[first : first + size]) for first in range(0, num_experts, size)]
        ranks: list[list[int]] = []
        for groups in pack(group_loads, range(num_groups), num_hosts, target=target):
            experts = [group * size + index for group in sorted(groups) for index in range(size)]
            ranks += place_among(
                experts, layer, num_slots=num_slots // num_hosts, num_ranks=ranks_per_host, target=target
            )
        layers.append(ranks)
    return ExpertPlacement.of_ranks(layers, num_experts=num_experts, ranks_per_host=ranks_per_host)


def place_among(
    experts: Sequence[int], loads: Sequence[float], *, num_slots: int, num_ranks: int, target: float
) -> list[list[int]]:
    """Replicate and pack some of a layer's experts on some ranks.

    Shapes: loads [all experts of the layer]; returns [num_ranks][num_slots / num_ranks], an expert each, ascending
    """
    own = [loads[expert] for expert in experts]
    counts = replica_counts(own, num_slots, most=num_ranks)
    owners = [index for index, count in enumerate(counts) for _ in range(count)]
    shares = [load / count for load, count in zip(own, counts, strict=True) for _ in range(count)]
    ranks = [[owners[item] for item in items] for items in pack(shares, owners, num_ranks, target=target)]
    repair = Repair(ranks, own, num_ranks)
    repair.run(sum(own) / num_ranks / target, most_moves=MOST_MOVES)
    return [sorted([experts[index] for index in indices]) for indices in repair.ranks]


def rank_loads(placement: ExpertPlacement, layer: int, loads: Sequence[float]) -> list[float]:
    """Return every rank's load in one layer, an expert's split evenly over its replicas.

    Shapes: loads [experts]; returns [ranks]
    """
    share = [load / len(slots) for load, slots in zip(loads, placement.logical_to_physical[layer], strict=True)]
    return [sum([share[expert] for expert in experts]) for experts in placement.experts_by_rank(layer)]


def balancedness(placement: ExpertPlacement, loads: Sequence[Sequence[float]]) -> float:
    """Return mean over heaviest rank, averaged over the layers: 1 when all ranks of each layer carry the same.

    Shapes: loads [layers][experts]
    """
    if len(loads) != placement.num_layers or check_loads(loads) != placement.num_experts:
        raise ValueError(f"loads must be {placement.num_layers} layers of {placement.num_experts} experts")
    ratios = []
    for layer, own in enumerate(loads):
        ranks = rank_loads(placement, layer, own)
        heaviest = max(ranks)
        ratios.append(sum(ranks) / len(ranks) / heaviest if heaviest else 1.0)
    return sum(ratios) / len(ratios)


def check_loads(loads: Sequence[Sequence[float]]) -> int:
    """Refuse loads that are none; return the number of experts."""
    if not loads or not loads[0]:
        raise ValueError("loads must have at least one layer and one expert")
    for index, layer in enumerate(loads):
        if len(layer) != len(loads[0]):
            raise ValueError(f"loads[{index}] must be of {len(loads[0])} experts as the first layer, got {len(layer)}")
        # A sum finds what is not finite, at a fraction of the cost of looking at each.
        if min(layer) < 0 or not math.isfinite(sum(layer)):
            raise ValueError(f"loads[{index}] must be finite and not negative")
    return len(loads[0])


def _check_target(target: float) -> None:
    if not 0 < target <= 1:
        raise ValueError(f"target must be above 0 and at most 1, got {target}")
