"""How fast KV moves from one process to another, beside what the machine's sockets and memory can do.

A prompt's KV lies in blocks in no order, 8 layers of 8 heads in bfloat16, and goes from one process's blocks into
another's; it has arrived when every byte is applied, and checked where there are checksums. Beside each size, in the
same round: raw sockets with as many streams, as iperf uses them (``raw``: one small buffer that stays in the cache) and
from and into memory of that size (``raw walk``); and one thread copying as many bytes of memory (``copy``). Rounds are
interleaved, medians and ratios of one round are told. ``--json`` writes a report.

    python -P -m slipstream.benchmarks.bench_kv --json benchmarks/results/kv.json

``--links 1000 5000``: instead, a prompt's KV over links of so many Mbit/s while it is computed (``kv/links.py``; needs
root, for network namespaces).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import IO

import numpy as np

from slipstream.benchmarks.kv.ends import LAYERS, TOKEN_BYTES, WAYS, Sender, memory
from slipstream.benchmarks.kv.links import measure_links
from slipstream.benchmarks.kv.raw import RawSender
from slipstream.benchmarks.report import write_report
from slipstream.comm.kv.outgoing import DEFAULT_FRAME_BYTES
from slipstream.tests.multinode.namespaces import missing

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One way at one size: medians over rounds; each ratio is the median of the rounds' ratios.

    Units: seconds, of one movement; cpu_s, of both processes together; gib_per_s
    """

    way: str
    mib: int
    streams: int
    frame_kib: int
    rounds: int
    seconds: float
    cpu_s: float
    gib_per_s: float
    to_raw: float
    to_raw_walk: float
    to_copy: float


class Receiver:
    """The other process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._in: IO[str] = process.stdin
        self._out: IO[str] = process.stdout
        self.hello = self.hear()

    def say(self, **command: object) -> None:
        """Send a command."""
        self._in.write(json.dumps(command) + "\n")
        self._in.flush()

    def hear(self) -> dict[str, object]:
        """Return the next answer."""
        line = self._out.readline()
        assert line, "the receiving process ended"
        answer: dict[str, object] = json.loads(line)
        return answer


@contextmanager
def receiver(folder: str, streams: int, most_tokens: int) -> Iterator[Receiver]:
    """Start the receiving process, and end it."""
    command = [sys.executable, "-P", "-m", "slipstream.benchmarks.kv.ends", folder, str(streams), str(most_tokens)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Receiver(process)
        assert process.stdin is not None
        process.stdin.close()


class Bench:
    """Both ends of all ways."""

    def __init__(self, other: Receiver, *, folder: str, streams: int, frame_bytes: int, most_tokens: int) -> None:
        self._other = other
        self._streams = streams
        self._frame_bytes = frame_bytes
        kv, self._layers = memory(most_tokens)
        addresses = other.hello["addresses"]
        assert isinstance(addresses, dict)
        self._senders = {
            way.name: Sender(way, kv, addresses[way.name], streams=streams, folder=folder, most_tokens=most_tokens)
            for way in WAYS
        }
        # As large as the source, or it would stay in the cache.
        self._copies = [np.ones(len(layer), dtype=np.uint8) for layer in self._layers]
        self._number = 0

    def move(self, way: str, num_tokens: int) -> tuple[float, float]:
        """Return the seconds of one movement, until the receiver says that all is applied, and processors'."""
        self._number += 1
        self._other.say(way=way, number=self._number, tokens=num_tokens)
        self._other.hear()
        begin_s, cpu_s = time.perf_counter(), time.process_time()
        self._senders[way].send(self._number, num_tokens, self._frame_bytes)
        return self._ended(begin_s, cpu_s)

    def raw(self, count: int, *, walk: bool) -> tuple[float, float]:
        """Return the seconds of as many bytes over plain sockets."""
        self._other.say(raw_bytes=count, streams=self._streams, walk=walk)
        port = self._other.hello["raw"]
        assert isinstance(port, int)
        sender = RawSender(port, self._streams, self._layers)
        begin_s, cpu_s = time.perf_counter(), time.process_time()
        sender.send(count, walk=walk)
        found = self._ended(begin_s, cpu_s)
        sender.close()
        return found

    def copy(self, count: int) -> tuple[float, float]:
        """Return the seconds of copying as many bytes of memory on one thread."""
        part = count // LAYERS
        begin_s, cpu_s = time.perf_counter(), time.process_time()
        for layer, copy in zip(self._layers, self._copies, strict=True):
            np.copyto(copy[:part], np.frombuffer(layer, dtype=np.uint8)[:part])
        return time.perf_counter() - begin_s, time.process_time() - cpu_s

    def _ended(self, begin_s: float, cpu_s: float) -> tuple[float, float]:
        theirs = self._other.hear()["cpu_s"]
        assert isinstance(theirs, float)
        return time.perf_counter() - begin_s, time.process_time() - cpu_s + theirs

    def close(self) -> None:
        """End the sending ends."""
        for sender in self._senders.values():
            sender.transport.close()


def measure(bench: Bench, mib: int, *, rounds: int, streams: int, frame_bytes: int) -> Iterator[Point]:
    """Yield every way at one size."""
    count = mib * MIB
    num_tokens = count // TOKEN_BYTES
    seconds: dict[str, list[tuple[float, float]]] = {}
    for index in range(rounds + 1):
        found = {way.name: bench.move(way.name, num_tokens) for way in WAYS}
        found |= {"raw": bench.raw(count, walk=False), "raw walk": bench.raw(count, walk=True)}
        found["copy"] = bench.copy(count)
        # The first round warms up.
        for name, value in found.items() if index else ():
            seconds.setdefault(name, []).append(value)
    for name, own in seconds.items():
        ratios = {
            peer: median(theirs / ours for (ours, _), (theirs, _) in zip(own, seconds[peer], strict=True))
            for peer in ("raw", "raw walk", "copy")
        }
        yield Point(
            way=name,
            mib=mib,
            streams=streams,
            frame_kib=frame_bytes >> 10,
            rounds=rounds,
            seconds=(typical_s := median(each for each, _ in own)),
            cpu_s=median(each for _, each in own),
            gib_per_s=count / typical_s / (1 << 30),
            to_raw=ratios["raw"],
            to_raw_walk=ratios["raw walk"],
            to_copy=ratios["copy"],
        )


def over_links(speeds: list[int], report: Path | None) -> None:
    """Measure links, print the table and write the report."""
    if (why := missing()) is not None:
        raise SystemExit(f"--links {why}")
    columns = (
        "Mbit/s",
        "wire/prefill",
        "prefill ms",
        "unsent MiB",
        "in layers",
        "extra ms",
        "extra",
        "serial ms",
        "extra",
    )
    print("  ".join(f"{name:>12}" for name in columns), flush=True)
    points = []
    for point in measure_links(speeds):
        points.append(point)
        row = (
            f"{point.mbit_per_s}",
            f"{point.wire_share:.2f}",
            f"{point.prefill_s * 1e3:.0f}",
            f"{point.unsent_mib:.2f}",
            f"{point.unsent_layers:.2f}",
            f"{point.extra_s * 1e3:.1f}",
            f"{point.extra:.1%}",
            f"{point.extra_serial_s * 1e3:.1f}",
            f"{point.extra_serial:.1%}",
        )
        print("  ".join(f"{cell:>12}" for cell in row), flush=True)
    if report:
        write_report(report, "kv-links", {"points": [asdict(point) for point in points]})


def main() -> None:
    """Measure, print the table and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--mib", type=int, nargs="+", default=[1, 16, 128, 1024])
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--frame-kib", type=int, default=DEFAULT_FRAME_BYTES >> 10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--links", type=int, nargs="+", metavar="MBIT_PER_S")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.links:
        over_links(arguments.links, arguments.json)
        return
    most_tokens = max(arguments.mib) * MIB // TOKEN_BYTES
    columns = ("way", "MiB", "ms", "CPU ms", "GiB/s", "x raw", "x raw walk", "x copy")
    print("  ".join(f"{name:>14}" for name in columns), flush=True)
    points = []
    frame_bytes = arguments.frame_kib << 10
    with (
        tempfile.TemporaryDirectory(prefix="slip") as folder,
        receiver(folder, arguments.streams, most_tokens) as other,
    ):
        bench = Bench(other, folder=folder, streams=arguments.streams, frame_bytes=frame_bytes, most_tokens=most_tokens)
        try:
            for mib in arguments.mib:
                rounds = arguments.rounds * (3 if mib <= 16 else 1)
                for point in measure(bench, mib, rounds=rounds, streams=arguments.streams, frame_bytes=frame_bytes):
                    points.append(point)
                    ratios = (f"{ratio:.2f}" for ratio in (point.to_raw, point.to_raw_walk, point.to_copy))
                    row = (
                        point.way,
                        f"{mib}",
                        f"{point.seconds * 1e3:.2f}",
                        f"{point.cpu_s * 1e3:.2f}",
                        f"{point.gib_per_s:.2f}",
                        *ratios,
                    )
                    print("  ".join(f"{cell:>14}" for cell in row), flush=True)
        finally:
            bench.close()
    if arguments.json:
        write_report(arguments.json, "kv", {"points": [asdict(point) for point in points]})


if __name__ == "__main__":
    main()
