"""How much wire time is hidden by computing one part of a step's tokens while the other's sums are on their way.

Two ranks of a tensor-parallel stack, dense and with experts, each on one core and in a network namespace of its own,
joined by a link that ``tbf`` shapes to several speeds. For each stack and speed: compute C (one rank's work, nothing
sent), wire M (the same sums, nothing computed), serial (each sum waited for at once), overlapped (cut where the cost
model says, or not at all), the ideal max(C, M), and the share of min(C, M) that was hidden. The arms take turns within
a run; each time is the slower rank's, each figure a median.

A link's bytes are copied by the core that computes: ``work`` is the share of M that this takes, and what cannot be
hidden. ``others`` is the share of a core that other processes used in the worst round that counts: each line is made of
its calmest rounds, and where even they were not calm it says little. ``cutting`` is how much longer the same compute
takes in parts, with nothing sent; ``halves`` what a cut in the middle would have brought where none was made. Needs
root, for the namespaces.

    python -P benchmarks/bench_overlap.py --json benchmarks/results/overlap.json
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slipstream.benchmarks.overlap.core_watch import CALM
from slipstream.benchmarks.overlap.points import POINTS, QUICK, Point
from slipstream.benchmarks.overlap.ranks import Rank, ask_all, ranks_on
from slipstream.benchmarks.report import write_report
from slipstream.tests.multinode.namespaces import hosts, missing

LINKS_MBIT_PER_S = (300, 1000, 3000)
POINT_TIMEOUT_S = 600.0
COVERED = (0.3, 1.0)
"""Shares of C in which M must be for the overlap to be held to the ideal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One line of the table; times are medians over rounds of the slower rank's."""

    point: str
    tokens: int
    link_mbit_per_s: int
    cuts: tuple[int, ...] | None
    compute_s: float
    compute_cut_s: float | None
    wire_s: float
    serial_s: float
    overlapped_s: float
    halves_s: float | None
    wire_work: float
    others: float
    metered_hidden_s: float
    expected_overlapped_s: float | None

    @property
    def ideal_s(self) -> float:
        """No order of work is faster, were the wire free of work."""
        return max(self.compute_s, self.wire_s)

    @property
    def hidden(self) -> float:
        """The share that was hidden of what can be."""
        return (self.serial_s - self.overlapped_s) / min(self.compute_s, self.wire_s)

    @property
    def over_ideal(self) -> float:
        """How much longer than the ideal it took."""
        return self.overlapped_s / self.ideal_s - 1

    @property
    def over_serial(self) -> float:
        """How much longer than serial it took."""
        return self.overlapped_s / self.serial_s - 1

    @property
    def is_covered(self) -> bool:
        """Whether the wire takes a share of the compute for which the ideal is wanted."""
        return COVERED[0] <= self.wire_s / self.compute_s <= COVERED[1]

    def line(self) -> str:
        """Return the line of the table."""
        cells = [self.compute_s, self.wire_s, self.serial_s, self.overlapped_s, self.ideal_s]
        times = "".join(f"{1e3 * cell:9.1f}" for cell in cells)
        cut_cost = f"{self.compute_cut_s / self.compute_s - 1:+.1%}" if self.compute_cut_s else ""
        halves = f"{self.halves_s / self.serial_s - 1:+.1%}" if self.halves_s else ""
        return (
            f"{self.point:11}{self.tokens:6}{self.link_mbit_per_s:6}{self.wire_s / self.compute_s:7.2f}"
            f"{len(self.cuts) + 1 if self.cuts else '-':>6}{times}{self.over_ideal:+9.1%}{self.over_serial:+9.1%}"
            f"{self.hidden:8.0%}"
            f"{self.wire_work:6.2f}{self.others:7.0%}{cut_cost:>8}{halves:>9}"
        )


HEADER = (
    f"{'stack':11}{'tokens':>6}{'Mb/s':>6}{'M/C':>7}{'parts':>6}{'C ms':>9}{'M ms':>9}{'serial':>9}{'overlap':>9}"
    f"{'ideal':>9}{'/ideal':>9}{'/serial':>9}{'hidden':>8}{'work':>6}{'others':>7}{'cutting':>8}{'halves':>9}"
)


def measure(ranks: Sequence[Rank], point: Point, link: int, *, repeats: int, order: str) -> Figures:
    """Have the ranks measure one point."""
    answers = ask_all(ranks, point.line(repeats=repeats, order=order), POINT_TIMEOUT_S)
    times_s: list[dict[str, list[float]]] = [answer["times_s"] for answer in answers]

    def median_s(arm: str) -> float:
        slower_s: list[float] = [max(both) for both in zip(*(times[arm] for times in times_s), strict=True)]
        return statistics.median(slower_s)

    first = answers[0]
    return Figures(
        point=point.name,
        tokens=point.tokens,
        link_mbit_per_s=link,
        cuts=None if first["cuts"] is None else tuple(first["cuts"]),
        compute_s=median_s("compute"),
        compute_cut_s=median_s("compute_cut") if "compute_cut" in times_s[0] else None,
        wire_s=median_s("wire"),
        serial_s=median_s("serial"),
        overlapped_s=median_s("overlapped"),
        halves_s=median_s("halves") if "halves" in times_s[0] else None,
        wire_work=first["wire_work"],
        others=first["others"],
        metered_hidden_s=statistics.mean(answer["metered_hidden_s"] for answer in answers),
        expected_overlapped_s=first["expected_overlapped_s"],
    )


def verdict(figures: Sequence[Figures]) -> list[str]:
    """Return what the table comes to."""
    covered = [line for line in figures if line.is_covered]
    near = [line for line in covered if line.over_ideal <= 0.1]
    slower = [line for line in figures if line.over_serial > 0.02]
    worst = max(figures, key=lambda line: line.over_serial)
    disturbed = sum(line.others > CALM for line in figures)
    return [
        f"M between {COVERED[0]} C and {COVERED[1]} C: {len(near)} of {len(covered)} within 10 % of ideal"
        + (f", the worst {max(line.over_ideal for line in covered):+.1%}" if covered else ""),
        f"slower than serial by more than 2 %: {len(slower)} of {len(figures)}, the worst {worst.over_serial:+.1%} "
        f"({worst.point}, {worst.tokens} tokens, {worst.link_mbit_per_s} Mb/s)",
        *([f"{disturbed} of {len(figures)} lines were disturbed: others used the ranks' cores"] if disturbed else []),
    ]


def as_values(figures: Figures) -> dict[str, Any]:
    """Return a line with what follows from it, for the report."""
    return {**asdict(figures), "ideal_s": figures.ideal_s, "hidden": figures.hidden, "over_ideal": figures.over_ideal}


def main() -> None:
    """Measure and print every point at every speed of the link."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="small stacks, few rounds")
    parser.add_argument("--repeats", type=int, help="rounds that count; 15, or 5 with --quick")
    parser.add_argument("--only", help="points whose name begins so")
    parser.add_argument("--links", type=int, nargs="+", default=LINKS_MBIT_PER_S, metavar="MBIT_PER_S")
    parser.add_argument(
        "--busy-wire", action="store_true", help="gloo's threads compete for the core instead of giving way"
    )
    parser.add_argument("--order", choices=("plain", "sharded", "ladder"), default="plain")
    options = parser.parse_args()
    # Asked to end, it still ends the ranks and removes their hosts.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if (reason := missing()) is not None:
        sys.exit(f"bench_overlap: {reason}")
    repeats = options.repeats or (5 if options.quick else 15)
    points = [point for point in (QUICK if options.quick else POINTS) if point.name.startswith(options.only or "")]
    figures: list[Figures] = []
    print(HEADER)
    with hosts(2) as machines, ranks_on(machines, wire_yields=not options.busy_wire) as ranks:
        for link in options.links:
            for machine in machines:
                machine.shape(mbit_per_s=link)
            for point in points:
                figures.append(measure(ranks, point, link, repeats=repeats, order=options.order))
                print(figures[-1].line(), flush=True)
    for sentence in verdict(figures):
        print(sentence)
    if options.json:
        write_report(
            options.json,
            "overlap",
            {"repeats": repeats, "order": options.order, "points": [as_values(line) for line in figures]},
        )


if __name__ == "__main__":
    main()
