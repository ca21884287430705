"""What a hand-off costs a request: time to the first decoded token, split against one replica that does all of it.

Two replicas of one core each, on hosts of their own (network namespaces) whose links are shaped. Prompts are computed
in one step; the first token is drawn by whoever computes the prompt, the second by whoever decodes:

- ``whole``: the decode replica computes the prompt too
- ``layers``: a prefill replica sends each layer while the next one computes
- ``serial``: it sends when the prompt is computed (as Splitwise's short prompts, arXiv 2311.18677, section 4.3)

Ways take turns, figures are medians. Wanted: at most 10 % more than ``whole`` for the second token, where the wire
takes less time than the prompt. Needs root, for the namespaces.

    python -P benchmarks/bench_hand_off.py --json benchmarks/results/hand_off.json
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slipstream.benchmarks.bench_isolation import MAX_LEN, SHAPE, Arm, model_with_tokenizer, replica
from slipstream.benchmarks.hand_off.ask import Question, Times
from slipstream.benchmarks.report import write_report
from slipstream.comm.handshake import SECRET_VARIABLE
from slipstream.tests.multinode.namespaces import hosts, missing

WHOLE_PROMPTS = ("--max-num-batched-tokens", str(MAX_LEN), "--no-enable-prefix-caching")
NEVER_BY_LAYERS = ("--kv-serial-below-tokens", str(MAX_LEN))
WAYS = ("whole", "layers", "serial")


class Asking:
    """The process that asks."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, question: Question) -> Times:
        """Ask one question and wait for its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(question)) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that asks has ended; its last lines say why")
        return Times(**json.loads(line))

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def measure(mbit_per_s: float, prompts: list[int], rounds: int, model: Path) -> list[dict[str, Any]]:
    """Return the figures of all ways and prompts over links of one speed."""
    with ExitStack() as stack:
        one, other, third = stack.enter_context(hosts(3, mbit_per_s=mbit_per_s))
        arm = Arm(name="", roles=("prefill", "decode"), options=WHOLE_PROMPTS)
        serial = Arm(name="", roles=("prefill", "decode"), options=(*WHOLE_PROMPTS, *NEVER_BY_LAYERS))
        senders = {
            "whole": "",
            "layers": stack.enter_context(replica(one, 0, "prefill-1", "prefill", model, arm)),
            "serial": stack.enter_context(replica(one, 0, "prefill-2", "prefill", model, serial)),
        }
        decode = stack.enter_context(replica(other, 1, "decode-1", "decode", model, arm))
        program = Path(__file__).resolve().parent / "hand_off" / "ask.py"
        asking = Asking(third.command(sys.executable, "-P", str(program)))
        stack.callback(asking.close)
        found = []
        for prompt in prompts:
            times: dict[str, list[Times]] = {way: [] for way in WAYS}
            # The first round meets and warms up.
            for turn in range(rounds + 1):
                for way in WAYS:
                    question = Question(
                        prefill=senders[way],
                        decode=decode,
                        decode_name="decode-1",
                        prompt=prompt,
                        vocabulary=SHAPE.vocabulary,
                        seed=turn,
                    )
                    answer = asking.ask(question)
                    if turn:
                        times[way].append(answer)
            found.append(row(mbit_per_s, prompt, times))
            print(line(found[-1]), flush=True)
    return found


def row(mbit_per_s: float, prompt: int, times: dict[str, list[Times]]) -> dict[str, Any]:
    """Return what is reported of a prompt's length."""

    def median(way: str, name: str) -> float:
        return float(statistics.median(getattr(each, name) for each in times[way]))

    whole_s = median("whole", "second_s")
    wire_s = times["layers"][0].bytes_moved * 8 / (mbit_per_s * 1e6)
    return {
        "mbit_per_s": mbit_per_s,
        "prompt": prompt,
        "bytes": times["layers"][0].bytes_moved,
        "wire_over_prompt": wire_s / median("whole", "first_s"),
        "first_ms": {way: median(way, "first_s") * 1e3 for way in WAYS},
        "second_ms": {way: median(way, "second_s") * 1e3 for way in WAYS},
        "more": {way: median(way, "second_s") / whole_s - 1 for way in WAYS},
        "hidden": {way: median(way, "hidden_s") / max(median(way, "wire_s"), 1e-9) for way in WAYS[1:]},
        "wait_ms": {way: median(way, "wait_s") * 1e3 for way in WAYS[1:]},
    }


HEADER = (
    f"{'Mb/s':>6}{'prompt':>8}{'MB':>7}{'wire/prompt':>13}  {'second token ms: whole':>22}{'layers':>9}{'serial':>9}"
    f"{'more: layers':>14}{'serial':>8}{'hidden':>9}{'wait ms: layers':>17}{'serial':>8}"
)


def line(found: dict[str, Any]) -> str:
    """Return a line of the table."""
    second, more, wait = found["second_ms"], found["more"], found["wait_ms"]
    return (
        f"{found['mbit_per_s']:6.0f}{found['prompt']:8}{found['bytes'] / 1e6:7.1f}{found['wire_over_prompt']:13.2f}  "
        f"{second['whole']:22.1f}{second['layers']:9.1f}{second['serial']:9.1f}{more['layers']:14.1%}"
        f"{more['serial']:8.1%}{found['hidden']['layers']:9.1%}{wait['layers']:17.1f}{wait['serial']:8.1f}"
    )


def main() -> int:
    """Run all links, print the table and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mbit-per-s", type=float, nargs="+", default=[1000.0, 5000.0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[256, 512, 1024, 2048], help="tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "slipstream-bench-models")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if (why := missing()) is not None:
        print(f"skipped: {why}")
        return 0
    os.environ.setdefault(SECRET_VARIABLE, secrets.token_hex(16))
    model = model_with_tokenizer(options.models)
    print(HEADER)
    rows = [row for speed in options.mbit_per_s for row in measure(speed, options.prompts, options.rounds, model)]
    if options.json:
        write_report(options.json, "hand_off", {"rounds": options.rounds, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
