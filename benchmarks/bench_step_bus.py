"""What it costs to send a step to a replica's ranks and to have all their answers: the step bus alone, no model.

The driver encodes a plan of 256 decoding rows and sends it; each rank, a process, decodes it and answers with nothing,
but for the last, which encodes a result of 256 tokens; the driver decodes that. Two kinds of plan: ``next``, in which
every row goes on where it was, and ``full``, which stands for itself. Prints median and P99 of the round trip, how much
of it is plans and results becoming bytes and back, bytes a step, and the ratio to a limit measured in between: the same
bytes to and from one rank over a bare socket of that kind, two system calls on either side. ``--json`` writes a report.

    python -P -m slipstream.benchmarks.bench_step_bus --json benchmarks/results/step_bus.json
"""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from slipstream.benchmarks.report import write_report
from slipstream.comm.errors import GroupClosed
from slipstream.comm.handshake import SECRET_VARIABLE, Identity, secret_from
from slipstream.comm.step_bus import StepHub
from slipstream.comm.step_endpoint import connect_rank
from slipstream.comm.step_listener import StepListener
from slipstream.runtime.messages import StepPlan, StepResult
from slipstream.runtime.worker.step_codec import PlanDecoder, PlanEncoder, decode_result, encode_result

ROWS = 256
REPLICA = "bench"
PATIENCE_S = 60.0
WARM_UP_STEPS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A round trip to so many ranks, in microseconds.

    ``codec_us``: encoding and decoding a plan and a result once each; ``bare_us``: the limit's median.
    """

    transport: str
    ranks: int
    plan: str
    median_us: float
    p99_us: float
    codec_us: float
    bare_us: float
    step_bytes: int
    result_bytes: int
    steps: int


def decode_plan(step: int) -> StepPlan:
    """Return a step in which 256 sequences each compute their next token."""
    none = np.empty(0, dtype=np.int32)
    return StepPlan(
        step=step,
        admitted=(),
        slots=np.arange(ROWS, dtype=np.int32),
        sequence_ids=np.arange(ROWS, dtype=np.int64) + 10_000,
        starts=np.full(ROWS, 100 + step, dtype=np.int32),
        counts=np.ones(ROWS, dtype=np.int32),
        samples=np.ones(ROWS, dtype=np.bool_),
        block_slots=none,
        block_indices=none,
        block_ids=none,
        copy_sources=none,
        copy_targets=none,
    )


def answer_steps(address: str, rank: int, *, reports: bool) -> None:
    """Be a rank: decode every plan, and answer with a result where this rank reports."""
    identity = Identity(replica=REPLICA, secret=secret_from(os.environ))
    endpoint = connect_rank(address, identity, rank=rank, timeout_s=PATIENCE_S, clock=time.monotonic)
    decoder = PlanDecoder(max_slots=ROWS)
    tokens = np.arange(ROWS, dtype=np.int32)
    try:
        while True:
            seq, payload = endpoint.next_step(PATIENCE_S)
            plan = decoder.decode(payload)
            result = StepResult(step=plan.step, token_ids=tokens, execute_s=0.0)
            endpoint.send_result(seq, encode_result(result) if reports else b"")
    except GroupClosed:
        pass
    finally:
        endpoint.close()


def answer_bytes(address: str, step_bytes: int, result_bytes: int) -> None:
    """Be the limit's other side: read so many bytes, write so many."""
    unix = address.startswith("unix:")
    host, _, port = address.rpartition(":")
    sock = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
    sock.connect(address.removeprefix("unix:") if unix else (host, int(port)))
    if not unix:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    answer = bytes(result_bytes)
    with sock:
        while len(sock.recv(step_bytes, socket.MSG_WAITALL)) == step_bytes:
            sock.sendall(answer)


@contextmanager
def others(commands: list[list[str]], environment: dict[str, str]) -> Iterator[None]:
    """Run this file's other sides as processes, and end them."""
    with ExitStack() as stack:
        for command in commands:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "slipstream.benchmarks.bench_step_bus", *command], env=environment
            )
            stack.callback(process.wait, PATIENCE_S)
            stack.callback(process.terminate)
        yield


def measure_bus(hub: StepHub, plan_kind: str, steps: int) -> tuple[np.ndarray, int, int]:
    """Return the seconds that each step took, and the bytes of the last plan and result."""
    encoder = PlanEncoder(max_slots=ROWS)
    reporting = hub.ranks[-1]
    costs_s = np.empty(steps)
    sent = answered = b""
    for step in range(-WARM_UP_STEPS, steps):
        plan = decode_plan(step + WARM_UP_STEPS)
        if plan_kind == "full":
            encoder.resync()
        start = time.perf_counter()
        sent = encoder.encode(plan)
        answered = hub.result(hub.send_step(sent), PATIENCE_S)[reporting]
        result = decode_result(answered)
        cost_s = time.perf_counter() - start
        assert len(result.token_ids) == ROWS, "a rank answered something else"
        if step >= 0:
            costs_s[step] = cost_s
    return costs_s, len(sent), len(answered)


def measure_codec(plan_kind: str, steps: int) -> float:
    """Return the median seconds of encoding and decoding a plan and a result."""
    encoder, decoder = PlanEncoder(max_slots=ROWS), PlanDecoder(max_slots=ROWS)
    result = StepResult(step=0, token_ids=np.arange(ROWS, dtype=np.int32), execute_s=0.0)
    costs_s = []
    for step in range(steps):
        plan = decode_plan(step)
        if plan_kind == "full":
            encoder.resync()
        start = time.perf_counter()
        decoder.decode(encoder.encode(plan))
        decode_result(encode_result(result))
        costs_s.append(time.perf_counter() - start)
    return float(np.median(costs_s))


def measure_bare(address: str, steps: int, step_bytes: int, result_bytes: int) -> float:
    """Return the median seconds of as many bytes there and back over a bare socket."""
    unix = address.startswith("unix:")
    listening = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
    with listening:
        listening.bind(address.removeprefix("unix:") if unix else ("127.0.0.1", 0))
        listening.listen()
        listening.settimeout(PATIENCE_S)
        where = address if unix else f"127.0.0.1:{listening.getsockname()[1]}"
        with others([["--bare", where, str(step_bytes), str(result_bytes)]], dict(os.environ)):
            sock, _ = listening.accept()
            with sock:
                sock.settimeout(None)
                if not unix:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                message = bytes(step_bytes)
                costs_s = []
                for _ in range(WARM_UP_STEPS + steps):
                    start = time.perf_counter()
                    sock.sendall(message)
                    sock.recv(result_bytes, socket.MSG_WAITALL)
                    costs_s.append(time.perf_counter() - start)
    return float(np.median(costs_s[WARM_UP_STEPS:]))


def measure(transport: str, ranks: int, steps: int) -> Iterator[Point]:
    """Measure both kinds of plan on one bus, each with its limit right after it."""
    environment = {**os.environ, SECRET_VARIABLE: secrets.token_hex(16)}
    identity = Identity(replica=REPLICA, secret=secret_from(environment))
    with tempfile.TemporaryDirectory(prefix="slip") as folder:
        bus = f"unix:{folder}/bus" if transport == "unix" else "127.0.0.1:0"
        with StepListener(bus) as listener:
            numbers = range(1, ranks + 1)
            joining = [["--join", listener.address, str(rank), str(int(rank == ranks))] for rank in numbers]
            with others(joining, environment):
                hub = listener.gather(identity, ranks=numbers, timeout_s=PATIENCE_S, clock=time.monotonic)
                try:
                    for kind in ("next", "full"):
                        costs_s, step_bytes, result_bytes = measure_bus(hub, kind, steps)
                        bare = f"unix:{folder}/bare-{kind}" if transport == "unix" else "127.0.0.1:0"
                        bare_s = measure_bare(bare, steps, step_bytes, result_bytes)
                        median_s, p99_s = np.percentile(costs_s, [50, 99])
                        yield Point(
                            transport=transport,
                            ranks=ranks,
                            plan=kind,
                            median_us=median_s * 1e6,
                            p99_us=p99_s * 1e6,
                            codec_us=measure_codec(kind, steps) * 1e6,
                            bare_us=bare_s * 1e6,
                            step_bytes=step_bytes,
                            result_bytes=result_bytes,
                            steps=steps,
                        )
                finally:
                    hub.close()


def main() -> None:
    """Measure, print the table and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 3, 7])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--join", nargs=3, metavar=("ADDRESS", "RANK", "REPORTS"), help=argparse.SUPPRESS)
    parser.add_argument("--bare", nargs=3, metavar=("ADDRESS", "STEP", "RESULT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.join:
        address, rank, reports = arguments.join
        answer_steps(address, int(rank), reports=bool(int(reports)))
        return
    if arguments.bare:
        address, step_bytes, result_bytes = arguments.bare
        answer_bytes(address, int(step_bytes), int(result_bytes))
        return
    columns = (
        "transport",
        "ranks",
        "plan",
        "median us",
        "P99 us",
        "codec us",
        "bare us",
        "x bare",
        "step bytes",
        "result bytes",
    )
    print("  ".join(f"{name:>12}" for name in columns))
    points = []
    for transport in ("unix", "tcp"):
        for ranks in arguments.ranks:
            for point in measure(transport, ranks, arguments.steps):
                points.append(point)
                costs = (point.median_us, point.p99_us, point.codec_us, point.bare_us)
                figures = (f"{value:.0f}" for value in costs)
                ratio = f"{point.median_us / point.bare_us:.1f}"
                sizes = (f"{point.step_bytes}", f"{point.result_bytes}")
                row = (point.transport, f"{point.ranks}", point.plan, *figures, ratio, *sizes)
                print("  ".join(f"{cell:>12}" for cell in row), flush=True)
    if arguments.json:
        write_report(arguments.json, "step_bus", {"rows": ROWS, "points": [asdict(point) for point in points]})


if __name__ == "__main__":
    main()
