"""What the gateway costs: tokens per second and added latency at 1,000 streams, before an engine without a model.

Three processes on one machine: this one with the clients, the gateway, and its driver. Each measurement has a gateway
of its own and follows a short unmeasured round.

- throughput: the engine answers at once and all streams run; tokens per second from the first request sent to the last
  answer read, against the limit of 15,000. Tokens per event says whether the gateway kept up with one event a token.
- latency: the engine steps at a fixed pace, and offers the very 15,000 tokens/s of the limit. All streams start at
  once, so that every step brings a token for every stream at the same moment: the hardest case, in which the last of
  them waits for the work on all the others. A token's added latency is the time from the end of its step to when it
  was read here: the driver's work after the step, the engine protocol, the gateway, the socket and this client. Steps
  end at whole multiples of the step time on the clock that both processes read. A stream's tokens are counted from its
  fastest one; when the driver misses a step, all that comes later counts as late, so that the figure is too high rather
  than too low.
- gRPC (``--grpc``): the same with all requests on one stream of the public gRPC service, whose messages hold what came
  for all of them; its limit is 30,000 tokens/s.
- held (``--hold SECONDS``): the same pace, but streams of mixed lengths, each followed by a new request when it ends.
  The gateway's resident memory every ten seconds, and the same latency.

Processor time is per token, of each process by itself. For latency it is that of the time in which all streams run; the
other two have the work that starts and ends requests in it. Writes JSON with ``--json``.

    python -P -m slipstream.benchmarks.bench_gateway --json benchmarks/results/gateway.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from slipstream.benchmarks.report import write_report
from slipstream.benchmarks.session_clients import SessionClients, SessionStream
from slipstream.benchmarks.stream_clients import Clients, Stream

AnyStream = Stream | SessionStream

LIMIT_TOKENS_PER_S = 15_000
LIMIT_GRPC_TOKENS_PER_S = 30_000
LIMIT_ADDED_P99_MS = 20.0

_LOOK_S = 0.5
_LOOK_HELD_S = 10.0
_NEVER_S = float("inf")
_SEED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What had been used and delivered at one moment. Times are seconds, those of processors since the start."""

    at_s: float
    tokens: int
    gateway_cpu_s: float
    driver_cpu_s: float
    clients_cpu_s: float
    gateway_rss_mib: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One round of streams, all of them ended."""

    streams: Sequence[AnyStream]
    looks: list[Look]
    duration_s: float

    @property
    def tokens(self) -> int:
        """Tokens of all streams."""
        return sum(stream.tokens for stream in self.streams)

    @property
    def figures(self) -> dict[str, Any]:
        """What the round took: over all of it, and per token between the first look and the last."""
        first, last = self.looks[0], self.looks[-1]
        tokens = max(1, last.tokens - first.tokens)
        return {
            "tokens_per_s": self.tokens / self.duration_s,
            "tokens_per_event": self.tokens / sum(stream.text_events for stream in self.streams),
            "gateway_us_per_token": (last.gateway_cpu_s - first.gateway_cpu_s) / tokens * 1e6,
            "driver_us_per_token": (last.driver_cpu_s - first.driver_cpu_s) / tokens * 1e6,
            "clients_us_per_token": (last.clients_cpu_s - first.clients_cpu_s) / tokens * 1e6,
            "gateway_rss_mib": [round(look.gateway_rss_mib, 1) for look in self.looks],
        }


class Gateway:
    """A gateway that runs, and its driver."""

    def __init__(self, process_id: int, port: int, grpc_port: int) -> None:
        self.port = port
        self.grpc_port = grpc_port
        self._process = psutil.Process(process_id)
        (self._driver,) = self._process.children()

    def take_cores(self) -> None:
        """Give the gateway a core of its own, and the others to its driver and to this process.

        Otherwise clients may run on the gateway's core, in the middle of its work: a message to a process wakes it
        where its sender runs. Clients elsewhere would not.
        """
        first, *others = sorted(os.sched_getaffinity(0))
        for process, cores in ((self._process, [first]), (self._driver, others), (psutil.Process(), others)):
            for thread in process.threads():
                os.sched_setaffinity(thread.id, cores or [first])

    def cpu_s(self) -> tuple[float, float]:
        """Return the processor time that gateway and driver have used."""
        gateway, driver = self._process.cpu_times(), self._driver.cpu_times()
        return gateway.user + gateway.system, driver.user + driver.system

    def rss_mib(self) -> float:
        """Return the gateway's resident memory."""
        return float(self._process.memory_info().rss) / 2**20


@contextmanager
def running_gateway(*, streams: int, step_time_s: float) -> Iterator[Gateway]:
    """Start a gateway; end it, and its driver, at the end."""
    cores = os.sched_getaffinity(0)
    module = ["-m", "slipstream.benchmarks.null_gateway"]
    options = ["--streams", str(streams), "--step-time", str(step_time_s)]
    process = subprocess.Popen([sys.executable, "-P", *module, *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("the gateway did not start; its last lines say why")
        gateway = Gateway(process.pid, **json.loads(line))
        gateway.take_cores()
        yield gateway
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        process.stdout.close()
        os.sched_setaffinity(0, cores)


class Measured:
    """One round of streams before a gateway, and what is looked at meanwhile."""

    def __init__(self, gateway: Gateway, *, grpc: bool) -> None:
        self._gateway = gateway
        self._clients: Any = SessionClients(gateway.grpc_port) if grpc else Clients(gateway.port)
        self._done: list[AnyStream] = []
        self._looks: list[Look] = []

    def run(self, lengths: Sequence[int], *, hold_s: float = 0.0, look_every_s: float | None = None) -> Run:
        """Run a stream of each length; for ``hold_s`` seconds, each that ends is followed by another.

        Looks at what was used every ``look_every_s`` seconds while all streams run; None: at the beginning and the end.
        """
        started = [self._clients.connect(tokens) for tokens in lengths]
        longest = max(lengths)
        start_s = time.monotonic()

        def ended(stream: AnyStream) -> None:
            self._done.append(stream)
            if time.monotonic() < start_s + hold_s:
                self._clients.connect(longest).ask()

        def look_between() -> None:
            all_begun = all(stream.arrivals_s for stream in started)
            if all_begun and (not self._done or time.monotonic() < start_s + hold_s):
                self._looks.append(self._look())

        if look_every_s is None:
            self._looks.append(self._look())
        for stream in started:
            stream.ask()
        self._clients.run(ended=ended, look=look_between, look_every_s=look_every_s or _NEVER_S)
        if look_every_s is None:
            self._looks.append(self._look())
        return Run(streams=self._done, looks=self._looks, duration_s=time.monotonic() - start_s)

    def _look(self) -> Look:
        gateway_s, driver_s = self._gateway.cpu_s()
        return Look(
            at_s=time.monotonic(),
            tokens=self._clients.tokens_read,
            gateway_cpu_s=gateway_s,
            driver_cpu_s=driver_s,
            clients_cpu_s=time.process_time(),
            gateway_rss_mib=self._gateway.rss_mib(),
        )


def added_latency_s(arrivals_s: NDArray[np.float64], step_time_s: float) -> NDArray[np.float64]:
    """Return how long after the end of its step each token of one stream was read.

    Steps end at whole multiples of ``step_time_s``, one a token. The stream's first step is the latest for which none
    of its tokens was read before it was drawn: its fastest token counts as less than a step late.

    Shapes: arrivals_s and result [tokens]
    """
    steps = np.arange(len(arrivals_s))
    first = (np.floor(arrivals_s / step_time_s) - steps).min()
    added: NDArray[np.float64] = arrivals_s - (first + steps) * step_time_s
    return added


def latency_figures(streams: Sequence[AnyStream], step_time_s: float, *, skip: int) -> dict[str, float]:
    """Return percentiles of all streams' added latency, in milliseconds, without each stream's first tokens."""
    added_s = [added_latency_s(np.array(stream.arrivals_s), step_time_s)[skip:] for stream in streams]
    p50, p90, p99, most = np.percentile(np.concatenate(added_s) * 1e3, [50, 90, 99, 100]).tolist()
    return {"added_p50_ms": p50, "added_p90_ms": p90, "added_p99_ms": p99, "added_max_ms": most}


def measure_throughput(streams: int, tokens: int, *, grpc: bool) -> dict[str, Any]:
    """Measure with an engine that answers at once."""
    with running_gateway(streams=streams, step_time_s=0.0) as gateway:
        Measured(gateway, grpc=grpc).run([tokens // 4] * streams)
        return Measured(gateway, grpc=grpc).run([tokens] * streams).figures


def measure_latency(streams: int, tokens: int, step_time_s: float, *, grpc: bool) -> dict[str, Any]:
    """Measure with an engine that steps at a pace, all streams in every step."""
    with running_gateway(streams=streams, step_time_s=step_time_s) as gateway:
        Measured(gateway, grpc=grpc).run([tokens // 4] * streams)
        run = Measured(gateway, grpc=grpc).run([tokens] * streams, look_every_s=_LOOK_S)
    # The first tokens come while requests are still being read: their cost is that of starting.
    return {**run.figures, **latency_figures(run.streams, step_time_s, skip=tokens // 4)}


def measure_held(streams: int, tokens: int, step_time_s: float, hold_s: float, *, grpc: bool) -> dict[str, Any]:
    """Measure streams that end and begin all the time."""
    lengths = random.Random(_SEED).choices(range(tokens // 4, tokens + 1), k=streams)
    with running_gateway(streams=streams, step_time_s=step_time_s) as gateway:
        run = Measured(gateway, grpc=grpc).run(lengths, hold_s=hold_s, look_every_s=_LOOK_HELD_S)
    seconds = [round(look.at_s - run.looks[0].at_s) for look in run.looks]
    return {**run.figures, "seconds": seconds, **latency_figures(run.streams, step_time_s, skip=tokens // 4)}


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each stream")
    parser.add_argument("--load", type=int, help="tokens/s at which latency is measured; the limit when left out")
    parser.add_argument("--hold", type=float, default=0.0, help="seconds for which streams follow one another")
    parser.add_argument("--grpc", action="store_true", help="over gRPC, all requests on one stream")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    streams, tokens, grpc = arguments.streams, arguments.tokens, arguments.grpc
    limit = LIMIT_GRPC_TOKENS_PER_S if grpc else LIMIT_TOKENS_PER_S
    load = arguments.load or limit
    step_time_s = streams / load
    # A pause of this process would count as the gateway's.
    gc.disable()
    figures: dict[str, Any] = {"streams": streams, "tokens": tokens, "offered_tokens_per_s": load, "grpc": grpc}
    figures["throughput"] = measure_throughput(streams, tokens, grpc=grpc)
    show("throughput", figures["throughput"], limit)
    figures["latency"] = measure_latency(streams, tokens, step_time_s, grpc=grpc)
    show("latency", figures["latency"], limit)
    if arguments.hold:
        figures["held"] = measure_held(streams, tokens, step_time_s, arguments.hold, grpc=grpc)
        show("held", figures["held"], limit)
    if arguments.json:
        limits = {"limit_tokens_per_s": limit, "limit_added_p99_ms": LIMIT_ADDED_P99_MS}
        write_report(arguments.json, "gateway-grpc" if grpc else "gateway", figures | limits)


def show(name: str, figures: dict[str, Any], limit: int) -> None:
    """Print what a round took."""
    speed = figures["tokens_per_s"]
    print(
        f"{name}: {speed:.0f} tokens/s, {speed / limit:.2f} of {limit};"
        f" {figures['tokens_per_event']:.2f} tokens an event; processor time a token:"
        f" gateway {figures['gateway_us_per_token']:.1f} us, driver {figures['driver_us_per_token']:.1f} us,"
        f" clients {figures['clients_us_per_token']:.1f} us"
    )
    if "added_p99_ms" in figures:
        p99_ms = figures["added_p99_ms"]
        print(
            f"  added latency of a token: P50 {figures['added_p50_ms']:.1f} ms, P90 {figures['added_p90_ms']:.1f} ms,"
            f" P99 {p99_ms:.1f} ms, most {figures['added_max_ms']:.1f} ms;"
            f" P99 is {p99_ms / LIMIT_ADDED_P99_MS:.2f} of {LIMIT_ADDED_P99_MS:.0f} ms"
        )
    if "seconds" in figures:
        memory = [f"{at} s {mib} MiB" for at, mib in zip(figures["seconds"], figures["gateway_rss_mib"], strict=True)]
        print(f"  gateway memory: {', '.join(memory)}", flush=True)


if __name__ == "__main__":
    main()
