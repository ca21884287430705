"""How well and how fast experts are placed: balance over ranks, experts moved when loads drift, bytes exchanged.

Prints for a model of 58 layers with 256 experts the balancedness (mean over heaviest rank, averaged over the layers)
beside that of dealing the experts in turn, with the limits that it is held to; what it costs to follow a drift; and
what grouping by co-activation saves on a router with hidden groups. Writes JSON with ``--json``.

    python -P -m slipstream.benchmarks.bench_expert_placement --json benchmarks/results/expert_placement.json
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

from slipstream.benchmarks.expert_workloads import PlantedRouter, drifted, lognormal_loads, zipf_loads
from slipstream.benchmarks.report import write_report
from slipstream.comm.expert_map import map_of
from slipstream.comm.expert_traffic import traffic
from slipstream.placement.expert_affinity import place_by_affinity
from slipstream.placement.expert_balance import balance_globally, balance_hierarchically, balancedness
from slipstream.placement.expert_counts import count_together
from slipstream.placement.expert_moves import moves_between, rebalance
from slipstream.placement.experts import ExpertPlacement, round_robin

LAYERS, EXPERTS, RANKS_PER_HOST = 58, 256, 8
LIMIT_S = 0.2
"""Time for all layers together."""

BALANCE_LIMITS = {("lognormal 1.0", "global", 288, 32): 0.94, ("lognormal 1.0", "global", 288, 72): 0.98}
BYTES_LIMIT = 0.7
"""Bytes moved after grouping, over those before."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """One placement of all layers."""

    loads: str
    policy: str
    num_slots: int
    num_ranks: int
    balancedness: float
    round_robin: float
    median_s: float
    limit: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """What following a drift costs: experts moved a layer, in place of all that a fresh placement would move."""

    sigma: float
    tolerance: float
    moves_per_layer: float
    fresh_moves_per_layer: float
    balancedness_before: float
    balancedness_after: float
    balancedness_fresh: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """Bytes with grouped experts over those with experts dealt in turn."""

    inside: float
    groups: int
    num_slots: int
    flat: float
    between_hosts: float
    hierarchical: float
    layer_s: float


def timed(run: Callable[[], Result], repeats: int) -> tuple[Result, float]:
    """Return what a run returns, and the median seconds that it takes."""
    seconds = []
    gc.collect()
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return result, median(seconds)


def measure_balance(name: str, loads: list[list[float]], policy: str, slots: int, ranks: int, repeats: int) -> Balance:
    """Place all layers and measure."""

    def run() -> ExpertPlacement:
        if policy == "global":
            return balance_globally(loads, num_slots=slots, num_ranks=ranks, ranks_per_host=RANKS_PER_HOST)
        return balance_hierarchically(
            loads, num_slots=slots, num_ranks=ranks, ranks_per_host=RANKS_PER_HOST, num_groups=8
        )

    placement, seconds = timed(run, repeats)
    dealt = round_robin(EXPERTS, ranks, num_layers=len(loads))
    return Balance(
        loads=name,
        policy=policy,
        num_slots=slots,
        num_ranks=ranks,
        balancedness=balancedness(placement, loads),
        round_robin=balancedness(dealt, loads),
        median_s=seconds,
        limit=BALANCE_LIMITS.get((name, policy, slots, ranks)),
    )


def measure_drift(sigma: float, tolerance: float, seed: int) -> Drift:
    """Follow loads that have changed since they were placed."""
    loads = lognormal_loads(LAYERS, EXPERTS, seed=seed)
    present = balance_globally(loads, num_slots=288, num_ranks=32, ranks_per_host=RANKS_PER_HOST)
    new = drifted(loads, sigma=sigma, seed=seed + 1)
    wanted = balance_globally(new, num_slots=288, num_ranks=32, ranks_per_host=RANKS_PER_HOST)
    found, seconds = timed(lambda: rebalance(present, wanted, new, tolerance=tolerance), 1)
    return Drift(
        sigma=sigma,
        tolerance=tolerance,
        moves_per_layer=len(found.moves) / LAYERS,
        fresh_moves_per_layer=len(moves_between(present, wanted)) / LAYERS,
        balancedness_before=balancedness(present, new),
        balancedness_after=balancedness(found.placement, new),
        balancedness_fresh=balancedness(wanted, new),
        seconds=seconds,
    )


def measure_grouping(inside: float, groups: int, slots: int, seed: int) -> Grouping:
    """Learn from some tokens of a router, then count what others move."""
    ranks = 32
    router = PlantedRouter(experts=EXPERTS, groups=groups, top_k=8, inside=inside, seed=seed)
    learned = [token for rows in router.batch(ranks, 200) for token in rows]
    loads = [0.0] * EXPERTS
    for token in learned:
        for expert in token:
            loads[expert] += 1
    together = count_together(learned, EXPERTS)
    grouped, seconds = timed(
        lambda: place_by_affinity([together], [loads], num_slots=slots, num_ranks=ranks, ranks_per_host=RANKS_PER_HOST),
        1,
    )
    choices = [torch.tensor(rows) for rows in router.batch(ranks, 50)]
    flat, across, inner = moved_rows(grouped, choices)
    dealt = round_robin(EXPERTS, ranks, ranks_per_host=RANKS_PER_HOST)
    flat_before, across_before, inner_before = moved_rows(dealt, choices)
    return Grouping(
        inside=inside,
        groups=groups,
        num_slots=slots,
        flat=flat / flat_before,
        between_hosts=across / across_before,
        hierarchical=(across + inner) / (across_before + inner_before),
        layer_s=seconds,
    )


def moved_rows(placement: ExpertPlacement, choices: Sequence[torch.Tensor]) -> tuple[int, int, int]:
    """Return the copies of tokens that travel: flat; over two levels, between hosts and inside them."""
    placed, hosts = map_of(placement, 0), placement.num_hosts
    (flat,) = traffic(choices, placed, sizes=(placement.num_ranks,))
    across, inner = traffic(choices, placed, sizes=(hosts, placement.ranks_per_host))
    return flat.moved_rows, across.moved_rows, inner.moved_rows


def print_row(*cells: str) -> None:
    """Print one row of a table."""
    print("  ".join(f"{cell:>13}" for cell in cells))


def report_balances(seed: int, repeats: int) -> list[Balance]:
    """Measure and print how balanced placements are."""
    workloads = {
        "lognormal 1.0": lognormal_loads(LAYERS, EXPERTS, seed=seed),
        "lognormal 1.5": lognormal_loads(LAYERS, EXPERTS, seed=seed, sigma=1.5),
        "zipf 0.8": zipf_loads(LAYERS, EXPERTS, seed=seed, exponent=0.8),
        "zipf 1.2": zipf_loads(LAYERS, EXPERTS, seed=seed, exponent=1.2),
    }
    shapes = (("global", 288, 32), ("global", 288, 72), ("hierarchical", 288, 32), ("global", 320, 64))
    print_row("loads", "policy", "slots", "ranks", "balance", "limit", "in turn", "median s", f"of {LIMIT_S} s")
    balances = []
    for name, loads in workloads.items():
        for policy, slots, ranks in shapes:
            one = measure_balance(name, loads, policy, slots, ranks, repeats)
            balances.append(one)
            limit = "-" if one.limit is None else f"{one.limit:.2f}"
            figures = (f"{one.balancedness:.4f}", limit, f"{one.round_robin:.4f}", f"{one.median_s:.3f}")
            print_row(name, policy, str(slots), str(ranks), *figures, f"{one.median_s / LIMIT_S:.2f}")
    return balances


def report_drifts(seed: int) -> list[Drift]:
    """Measure and print what following a drift costs."""
    print_row("drift", "tolerance", "moves/layer", "fresh", "before", "after", "fresh", "s")
    drifts = []
    for sigma in (0.1, 0.3):
        for tolerance in (0.02, 0.05, 0.1):
            one = measure_drift(sigma, tolerance, seed)
            drifts.append(one)
            moves = (f"{one.moves_per_layer:.1f}", f"{one.fresh_moves_per_layer:.1f}")
            ratios = (one.balancedness_before, one.balancedness_after, one.balancedness_fresh)
            print_row(f"{sigma}", f"{tolerance}", *moves, *(f"{ratio:.4f}" for ratio in ratios), f"{one.seconds:.2f}")
    return drifts


def report_groupings(seed: int) -> list[Grouping]:
    """Measure and print what grouping saves."""
    print(f"bytes after grouping over bytes before (limit {BYTES_LIMIT} where groups are planted)")
    print_row("inside", "groups", "slots", "flat", "between hosts", "hierarchical", "s a layer")
    groupings = []
    for inside, groups, slots in ((0.9, 32, 256), (0.9, 16, 256), (0.9, 16, 288), (0.7, 16, 256), (0.0, 16, 256)):
        one = measure_grouping(inside, groups, slots, seed)
        groupings.append(one)
        figures = (one.flat, one.between_hosts, one.hierarchical, one.layer_s)
        print_row(f"{inside}", f"{groups}", f"{slots}", *(f"{figure:.2f}" for figure in figures))
    return groupings


def main() -> None:
    """Measure, print the tables and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    balances = report_balances(arguments.seed, arguments.repeats)
    print()
    drifts = report_drifts(arguments.seed)
    print()
    groupings = report_groupings(arguments.seed)
    if arguments.json:
        figures: dict[str, Sequence[Balance | Drift | Grouping]] = {
            "balance": balances,
            "drift": drifts,
            "grouping": groupings,
        }
        write_report(
            arguments.json,
            "expert_placement",
            {name: [asdict(one) for one in measured] for name, measured in figures.items()},
        )


if __name__ == "__main__":
    main()
