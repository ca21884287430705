"""How much sooner a long prompt is computed when sequence-parallel ranks share it, and how much wire time they hide.

Ranks of one core and one thread each, in network namespaces joined by links that ``tbf`` shapes (0: not at all). For
each prompt: alone (one rank computes all of it, the others stand idle), divided, serial (divided, but each hop is
waited for at once), and wire, the same exchange with nothing computed. ``hidden`` is the share of the wire's time by
which divided is faster than serial; ``speedup`` is alone over divided, at most the number of ranks. By the slower
rank's meter, divided is compute and what was waited, for the wire or for the other rank. The arms take turns; each time
is the slower rank's, each figure a median. ``work`` is the speedup in processor time, gloo's threads included: what is
left of it where others use the cores too. ``others`` is the largest share of a rank's core that other
processes used meanwhile: above some per cent, the line says little. Needs root, for the namespaces.

    python -P benchmarks/bench_sequence_parallel.py --json benchmarks/results/sequence_parallel.json
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

from slipstream.benchmarks.engine.models import ensure_model
from slipstream.benchmarks.engine.points import M120, TINY
from slipstream.benchmarks.overlap.ranks import Rank, ask_all, ranks_on
from slipstream.benchmarks.report import write_report
from slipstream.tests.multinode.namespaces import hosts, missing

LINKS_MBIT_PER_S = (1000, 3000)
PROMPTS = (4096, 8192)
CHUNK = 2048
PROMPT_TIMEOUT_S = 1800.0
_PROGRAM = Path(__file__).resolve().parent / "sequence" / "rank.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One line of the table; times are medians over rounds of the slower rank's."""

    ranks: int
    tokens: int
    chunk: int
    link_mbit_per_s: int
    alone_s: float
    divided_s: float
    serial_s: float
    wire_s: float
    compute_s: float
    exposed_s: float
    alone_work_s: float
    divided_work_s: float
    others: float

    @property
    def speedup(self) -> float:
        """How many times sooner the prompt is computed."""
        return self.alone_s / self.divided_s

    @property
    def work_speedup(self) -> float:
        """How many times less processor time the busier rank takes than one alone."""
        return self.alone_work_s / self.divided_work_s

    @property
    def hidden(self) -> float:
        """The share of the wire's time that was hidden."""
        return (self.serial_s - self.divided_s) / self.wire_s

    def line(self) -> str:
        """Return the line of the table."""
        cells = (self.alone_s, self.divided_s, self.serial_s, self.compute_s, self.exposed_s, self.wire_s)
        times = "".join(f"{cell:9.2f}" for cell in cells)
        return (
            f"{self.ranks:5}{self.tokens:8}{self.chunk:7}{self.link_mbit_per_s or '-':>7}{times}"
            f"{self.hidden:8.0%}{self.speedup:9.2f}{self.work_speedup:7.2f}{self.others:8.0%}"
        )


HEADER = (
    f"{'ranks':>5}{'prompt':>8}{'chunk':>7}{'Mb/s':>7}{'alone s':>9}{'divided':>9}{'serial':>9}"
    f"{'compute':>9}{'waited':>9}{'wire':>9}{'hidden':>8}{'speedup':>9}{'work':>7}{'others':>8}"
)


def measure(ranks: Sequence[Rank], model: Path, tokens: int, chunk: int, link: int, *, repeats: int) -> Figures:
    """Have the ranks compute one prompt."""
    question = {"model": str(model), "tokens": tokens, "chunk": chunk, "repeats": repeats}
    return figures_of(ask_all(ranks, question, PROMPT_TIMEOUT_S), tokens=tokens, chunk=chunk, link=link)


def figures_of(answers: Sequence[dict[str, Any]], *, tokens: int, chunk: int, link: int) -> Figures:
    """Return what the ranks' answers come to."""

    def median_s(arm: str, what: str = "times_s") -> float:
        slower_s: list[float] = [max(times) for times in zip(*(answer[what][arm] for answer in answers), strict=True)]
        return statistics.median(slower_s)

    return Figures(
        ranks=len(answers),
        tokens=tokens,
        chunk=chunk,
        link_mbit_per_s=link,
        alone_s=median_s("alone"),
        divided_s=median_s("divided"),
        serial_s=median_s("serial"),
        wire_s=median_s("wire"),
        compute_s=max(answer["compute_s"] for answer in answers),
        exposed_s=max(answer["exposed_s"] for answer in answers),
        alone_work_s=median_s("alone", "work_s"),
        divided_work_s=median_s("divided", "work_s"),
        others=max(answer["others"] for answer in answers),
    )


def as_values(figures: Figures) -> dict[str, Any]:
    """Return a line with what follows from it, for the report."""
    return {
        **asdict(figures),
        "speedup": figures.speedup,
        "work_speedup": figures.work_speedup,
        "hidden": figures.hidden,
    }


def main() -> None:
    """Measure and print every prompt at every speed of the link."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--models", type=Path, default=Path.home() / ".cache" / "slipstream" / "benchmarks")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a tiny model and a short prompt")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count")
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS, metavar="TOKENS")
    parser.add_argument("--chunks", type=int, nargs="+", default=[CHUNK], metavar="TOKENS")
    parser.add_argument("--links", type=int, nargs="+", default=LINKS_MBIT_PER_S, metavar="MBIT_PER_S")
    parser.add_argument(
        "--busy-wire", action="store_true", help="gloo's threads compete for the core instead of giving way"
    )
    options = parser.parse_args()
    # Asked to end, it still ends the ranks and removes their hosts.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if (reason := missing()) is not None:
        sys.exit(f"bench_sequence_parallel: {reason}")
    model = ensure_model(TINY if options.quick else M120, options.models)
    prompts = [1024] if options.quick else options.prompts
    figures: list[Figures] = []
    print(HEADER)
    with hosts(options.ranks) as machines, ranks_on(machines, _PROGRAM, wire_yields=not options.busy_wire) as ranks:
        for link in options.links:
            for machine in machines:
                machine.shape(mbit_per_s=link or None)
            for tokens in prompts:
                for chunk in options.chunks:
                    figures.append(measure(ranks, model, tokens, chunk, link, repeats=options.repeats))
                    print(figures[-1].line(), flush=True)
    if options.json:
        write_report(options.json, "sequence_parallel", {"lines": [as_values(line) for line in figures]})


if __name__ == "__main__":
    main()
