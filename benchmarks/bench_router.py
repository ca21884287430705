"""Prefix-aware routing of a real trace, and how long a decision takes.

Replays Mooncake's conversation trace (12,031 requests in an hour, over 40 % of their tokens seen before) against ten
imagined prefill nodes with caches of 3 million tokens each. The router that gateways run chooses; beside it the least
loaded node (the same router, blind to caches), the node with the longest cached beginning, and a bound: one cache of
all nodes' size that all share, and the node with the least work left, known exactly. The limits: at least 80 % of the
way from the least loaded to the bound in mean time to first token, and under 100 us a decision among 64 replicas.

Times in the trace come in ticks of 3 s: they are replayed as they are, and with each request at a random moment of its
tick. ``--trace`` names the file; without it a small made-up trace is replayed, for which no limit holds.

    python -P benchmarks/bench_router.py --trace traces/mooncake_conversation_trace.jsonl.gz --json router.json
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from slipstream.benchmarks.report import write_report
from slipstream.benchmarks.router.decisions import Decisions, measure
from slipstream.benchmarks.router.replay import ByPrefix, ByRouter, ByWorkLeft, Fleet, Outcome, replay
from slipstream.benchmarks.router.trace import Arrival, conversations, read_trace, within_ticks
from slipstream.runtime.gateway.routes import RouterSettings

CLOSED_LIMIT, DECISION_LIMIT_S = 0.8, 100e-6
TRACE_VARIABLE = "SLIPSTREAM_MOONCAKE_TRACE"

# The transfer does not delay the first token, which is what is compared here.
SETTINGS = RouterSettings(first_link_bytes_per_s=1e15)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to replay. ``speed``: of time against the trace's own; a case with a limit is judged."""

    name: str
    arrivals: list[Arrival]
    speed: float
    judged: bool


def main() -> None:
    """Replay, measure, print, and exit with 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=os.environ.get(TRACE_VARIABLE), help="also " + TRACE_VARIABLE)
    parser.add_argument("--requests", type=int, default=0, help="only so many of the trace")
    parser.add_argument("--nodes", type=int, default=10)
    parser.add_argument("--decisions", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    fleet = Fleet(nodes=given.nodes)
    results: list[dict[str, Any]] = []
    for case in cases(given):
        outcomes = run(case, fleet)
        figures = {name: asdict(outcome) for name, outcome in outcomes.items()}
        results.append({"case": case.name, "judged": case.judged, "closed": closed(outcomes), "outcomes": figures})
        show(case, outcomes)
    decisions = [
        measure(replicas=64, tokens=tokens, cached_share=share, count=given.decisions)
        for tokens, share in ((1000, 0.0), (1000, 1.0), (4000, 1.0), (16000, 1.0))
    ]
    show_decisions(decisions)
    if given.json:
        write_report(given.json, "router", {"cases": results, "decisions": [asdict(each) for each in decisions]})
    late = [each for each in results if each["judged"] and each["closed"] < CLOSED_LIMIT]
    missed = [f"{each['case']}: {each['closed']:.0%} closed" for each in late]
    missed += [f"{each.again_s * 1e6:.0f} us" for each in decisions if each.again_s > DECISION_LIMIT_S]
    print("\nall within limits" if not missed else f"\nbeyond limits: {', '.join(missed)}")
    sys.exit(bool(missed))


def cases(given: argparse.Namespace) -> Iterator[Case]:
    """Return what is replayed."""
    if not given.trace:
        print("no trace was named (--trace): a made-up one is replayed, for which no limit holds")
        arrivals = conversations(given.requests or 2000, given.seed)
        yield Case(name="made up", arrivals=arrivals, speed=1.0, judged=False)
        return
    arrivals = read_trace(Path(given.trace))[: given.requests or None]
    moved = within_ticks(arrivals, given.seed)
    whole = not given.requests
    yield Case(name="within ticks", arrivals=moved, speed=1.0, judged=whole)
    yield Case(name="as it is", arrivals=arrivals, speed=1.0, judged=whole)
    yield Case(name="within ticks, time x 0.75", arrivals=_faster(moved, 0.75), speed=0.75, judged=False)
    yield Case(name="within ticks, time x 1.25", arrivals=_faster(moved, 1.25), speed=1.25, judged=False)


def run(case: Case, fleet: Fleet) -> dict[str, Outcome]:
    """Replay a case in each way; the one that collapses only once, since it does whatever the load."""
    arrivals = case.arrivals
    outcomes = {"least loaded": replay(arrivals, fleet, lambda names: ByRouter(names, SETTINGS, blind=True))}
    if case.speed == 1.0:
        outcomes["longest prefix"] = replay(arrivals, fleet, lambda names: ByPrefix())
    outcomes["router"] = replay(arrivals, fleet, lambda names: ByRouter(names, SETTINGS))
    outcomes["shared cache"] = replay(arrivals, fleet, lambda names: ByWorkLeft(), shared=True)
    return outcomes


def closed(outcomes: dict[str, Outcome]) -> float:
    """Return how much of the way from the least loaded to the bound the router goes."""
    worst, best = outcomes["least loaded"].mean_ttft_s, outcomes["shared cache"].mean_ttft_s
    return (worst - outcomes["router"].mean_ttft_s) / (worst - best)


def show(case: Case, outcomes: dict[str, Outcome]) -> None:
    """Print one case."""
    print(f"\n{case.name}: {len(case.arrivals)} requests")
    print(f"{'':>16}  {'mean s':>8}  {'p50':>7}  {'p99':>8}  {'hits':>6}  {'busy':>5}  {'busiest got':>11}")
    for name, each in outcomes.items():
        print(
            f"{name:>16}  {each.mean_ttft_s:8.2f}  {each.p50_ttft_s:7.2f}  {each.p99_ttft_s:8.2f}  "
            f"{each.hit_share:6.1%}  {each.busy_share:5.0%}  {each.most_share:11.1%}"
        )
    limit = f" (limit {CLOSED_LIMIT:.0%})" if case.judged else ""
    print(f"of the way to the bound: {closed(outcomes):.1%}{limit}", flush=True)


def show_decisions(decisions: list[Decisions]) -> None:
    """Print what choosing takes."""
    print(f"\n{'replicas':>8}  {'tokens':>6}  {'cached up to':>12}  {'first us':>8}  {'again us':>8}  {'p99 us':>7}")
    for each in decisions:
        print(
            f"{each.replicas:8}  {each.tokens:6}  {each.cached_share:12.0%}  {each.first_s * 1e6:8.1f}  "
            f"{each.again_s * 1e6:8.1f}  {each.p99_s * 1e6:7.1f}"
        )


def _faster(arrivals: list[Arrival], speed: float) -> list[Arrival]:
    return [replace(each, at_s=each.at_s / speed) for each in arrivals]


if __name__ == "__main__":
    main()
