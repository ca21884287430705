"""Time between tokens of requests that generate, while long prompts arrive: split pools against mixed replicas.

Two cores, one for each of two replicas, on hosts of their own (network namespaces) whose links are shaped:

- ``prefill first``: two mixed replicas that compute each prompt whole, in one step
- ``chunked``: two mixed replicas with chunked prefill (Sarathi-Serve, arXiv 2403.02310)
- ``split``: a prefill and a decode replica (DistServe, arXiv 2401.09670; Splitwise, arXiv 2311.18677)

Gateway and clients run on a third host and share the cores. The arms take turns; what is printed are medians over the
rounds. Needs root, for the namespaces.

    python -P benchmarks/bench_isolation.py --json benchmarks/results/isolation.json
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slipstream.benchmarks.engine.models import ensure_model
from slipstream.benchmarks.engine.points import Shape
from slipstream.benchmarks.isolation.load import Measured, Order
from slipstream.benchmarks.report import write_report
from slipstream.comm.handshake import SECRET_VARIABLE
from slipstream.tests.multinode.namespaces import Host, hosts, missing

TOKENIZER = Path(__file__).resolve().parent.parent / "examples" / "demo_model"
SHAPE = Shape(name="isolation-25m", hidden=512, layers=8, heads=8, kv_heads=4, ffn=1408, vocabulary=4096)
CHUNK_TOKENS = 128
MAX_LEN = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to serve. ``roles``: of the two replicas; ``options``: more arguments for their processes."""

    name: str
    roles: tuple[str, str]
    options: tuple[str, ...]


ARMS = (
    Arm(name="prefill first", roles=("mixed", "mixed"), options=("--max-num-batched-tokens", str(MAX_LEN))),
    Arm(name="chunked", roles=("mixed", "mixed"), options=("--max-num-batched-tokens", str(CHUNK_TOKENS))),
    Arm(name="split", roles=("prefill", "decode"), options=("--max-num-batched-tokens", str(CHUNK_TOKENS))),
)


@contextmanager
def replica(host: Host, core: int, name: str, role: str, model: Path, arm: Arm) -> Iterator[str]:
    """Start a replica on a host and a core; yields its address."""
    split = () if role == "mixed" else ("--role", role, "--kv-transport", "tcp", "--kv-address", host.address)
    command = host.command(
        *("taskset", "-c", str(core), sys.executable, "-P", "-m", "slipstream.runtime.worker.main"),
        *("--listen", f"{host.address}:0", "--replica", name, "--rank", "0"),
        *("--address", host.address, "--ranks-on-host", "1", *split),
        *(("--kv-across-hosts",) if split else ()),
        *("--device", "cpu", "--dtype", "float32", "--num-threads", "1", "--max-model-len", str(MAX_LEN)),
        *("--max-num-seqs", "64", "--kv-cache-memory-bytes", str(512 << 20), *arm.options, str(model)),
    )
    # It ends when its standard input does.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "address" in (said := json.loads(line)):
                yield said["address"]
                return
        raise RuntimeError(f"{name} did not start; its last lines say why")
    finally:
        process.kill()
        process.wait()


def measure(arm: Arm, model: Path, options: argparse.Namespace, seed: int) -> Measured:
    """Put the load on one arm."""
    with ExitStack() as stack:
        one, other, clients = stack.enter_context(hosts(3, mbit_per_s=options.mbit_per_s))
        replicas = []
        for place, (host, role) in enumerate(zip((one, other), arm.roles, strict=True)):
            name = f"{role}-{place + 1}"
            address = stack.enter_context(replica(host, place, name, role, model, arm))
            replicas.append([name, role, address])
        order = Order(
            replicas=replicas,
            address=clients.address,
            vocabulary=SHAPE.vocabulary,
            gateway=["--split-from-tokens", "64"] if "prefill" in arm.roles else [],
            generating=options.generating,
            short_prompt=16,
            generated=options.generated,
            long_prompt=options.long_prompt,
            every_s=options.every_s,
            seconds=options.seconds,
            seed=seed,
        )
        program = Path(__file__).resolve().parent / "isolation" / "load.py"
        done = subprocess.run(
            clients.command(sys.executable, "-P", str(program)),
            input=json.dumps(asdict(order)) + "\n",
            stdout=subprocess.PIPE,
            text=True,
            timeout=options.seconds + 300,
            check=True,
        )
        return Measured(**json.loads(done.stdout.splitlines()[-1]))


def percentile(values: list[float], share: float) -> float:
    """Return a percentile, or no number of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def figures(measured: Measured) -> dict[str, float]:
    """Return what is reported of one round, times in milliseconds."""
    gaps, firsts = measured.gaps_s, measured.first_s
    return {
        "gap_p50_ms": percentile(gaps, 0.5) * 1e3,
        "gap_p99_ms": percentile(gaps, 0.99) * 1e3,
        "gap_worst_ms": max(gaps, default=float("nan")) * 1e3,
        "long_first_p50_ms": percentile(firsts, 0.5) * 1e3,
        "long_first_worst_ms": max(firsts, default=float("nan")) * 1e3,
        "tokens": float(len(gaps)),
        "long_prompts": float(len(firsts)),
        "failed": float(measured.failed),
    }


def model_with_tokenizer(folder: Path) -> Path:
    """Return the directory of the model, with a tokenizer that gateways can read."""
    model = ensure_model(SHAPE, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, model / name)
    return model


def main() -> int:
    """Run all arms in turns, print the table and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--generating", type=int, default=8, help="requests that generate all the time")
    parser.add_argument("--generated", type=int, default=200, help="tokens of each of these")
    parser.add_argument("--long-prompt", type=int, default=1536, help="tokens of each long prompt")
    parser.add_argument("--every-s", type=float, default=2.0, help="seconds between two long prompts, on average")
    parser.add_argument("--mbit-per-s", type=float, default=1000.0, help="of each host's link")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "slipstream-bench-models")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if (why := missing()) is not None:
        print(f"skipped: {why}")
        return 0
    os.environ.setdefault(SECRET_VARIABLE, secrets.token_hex(16))
    model = model_with_tokenizer(options.models)
    found: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in ARMS}
    for turn in range(options.rounds):
        for arm in ARMS:
            found[arm.name].append(figures(measure(arm, model, options, seed=turn)))
    medians = {
        name: {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        for name, rounds in found.items()
    }
    print_table(medians)
    if options.json:
        setting: dict[str, Any] = {
            name: value for name, value in vars(options).items() if name not in ("json", "models")
        }
        write_report(options.json, "isolation", {"setting": setting, "median": medians, "rounds": found})
    return 0


def print_table(medians: dict[str, dict[str, float]]) -> None:
    """Print a line for each arm."""
    columns = ("gap_p50_ms", "gap_p99_ms", "gap_worst_ms", "long_first_p50_ms", "long_first_worst_ms", "tokens")
    print(f"{'':16}" + "".join(f"{column:>21}" for column in columns) + f"{'P99 to chunked':>16}")
    base = medians["chunked"]["gap_p99_ms"]
    for name, each in medians.items():
        cells = "".join(f"{each[column]:21.1f}" for column in columns)
        print(f"{name:16}{cells}{each['gap_p99_ms'] / base:16.2f}")


if __name__ == "__main__":
    sys.exit(main())
