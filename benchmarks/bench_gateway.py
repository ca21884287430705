"""What the gateway costs: tokens per second and added latency at 1,000 streams, before an engine without a model.

Three processes: this one with the clients, the gateway, and its driver. Two measurements:

- throughput: the engine answers at once, all streams run; tokens per second against the limit of 15,000
- latency: the engine steps at a fixed pace, for a share of that throughput. A token's added latency is how long after
  the fastest token of its step it was read here. It is told from the pace: when the driver falls behind it, all that
  comes later counts as late, so that the figure is too high rather than too low.

Also the gateway's resident memory before and after the measured requests, which follow one unmeasured round, and the
processor time of all three. Writes JSON with ``--json``.

    python -P -m slipstream.benchmarks.bench_gateway --json benchmarks/results/gateway.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvloop
from numpy.typing import NDArray

from slipstream.benchmarks.null_gateway import MODEL_NAME
from slipstream.benchmarks.report import write_report

LIMIT_TOKENS_PER_S = 15_000
LIMIT_ADDED_P99_MS = 20.0
PROMPT_TOKENS = 16

_TIMEOUT_S = 300.0
_CHUNK_BYTES = 1 << 16
_TOKEN = b"~"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One round of streams. ``arrivals_s`` [streams, tokens]: when each token was read, a monotonic clock's seconds."""

    arrivals_s: NDArray[np.float64]
    duration_s: float
    gateway_cpu_s: float
    driver_cpu_s: float
    client_cpu_s: float
    rss_before_mib: float
    rss_after_mib: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all streams over the round's duration."""
        return self.arrivals_s.size / self.duration_s


class Gateway:
    """A gateway that runs, and its driver."""

    def __init__(self, process_id: int, port: int) -> None:
        self.port = port
        self._process = psutil.Process(process_id)
        (self._driver,) = self._process.children()

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
    module = ["-m", "slipstream.benchmarks.null_gateway"]
    options = ["--streams", str(streams), "--step-time", str(step_time_s)]
    process = subprocess.Popen([sys.executable, "-P", *module, *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("the gateway did not start; its last lines say why")
        yield Gateway(process.pid, json.loads(line)["port"])
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        process.stdout.close()


async def stream(port: int, index: int, arrivals_s: NDArray[np.float64], start: asyncio.Event) -> None:
    """Ask for one stream on a connection of its own and note when each token was read.

    Bytes are counted, not parsed: a client that did more would be what is measured.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    prompt = [(index + place) % 1000 for place in range(PROMPT_TOKENS)]
    body: dict[str, Any] = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": len(arrivals_s), "stream": True}
    content = json.dumps(body | {"temperature": 0, "stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n"
    await start.wait()
    writer.write(head.encode() + b"content-type: application/json\r\nconnection: close\r\n\r\n" + content)
    seen, tail = 0, b""
    while chunk := await reader.read(_CHUNK_BYTES):
        now_s = time.monotonic()
        new = chunk.count(_TOKEN)
        arrivals_s[seen : seen + new] = now_s
        seen += new
        tail = (tail + chunk)[-1000:]
    writer.close()
    counted = f'"completion_tokens":{len(arrivals_s)},'.encode()
    if seen != len(arrivals_s) or counted not in tail or b"data: [DONE]" not in tail:
        raise RuntimeError(f"stream {index} ended after {seen} of {len(arrivals_s)} tokens: {tail!r}")


async def run_round(gateway: Gateway, *, streams: int, tokens: int) -> Run:
    """Run all streams at once to their ends."""
    arrivals_s = np.zeros((streams, tokens))
    start = asyncio.Event()
    async with asyncio.timeout(_TIMEOUT_S), asyncio.TaskGroup() as clients:
        for index in range(streams):
            clients.create_task(stream(gateway.port, index, arrivals_s[index], start))
        rss_before_mib, cpu_s, own_s = gateway.rss_mib(), gateway.cpu_s(), time.process_time()
        start_s = time.monotonic()
        start.set()
    end_s = time.monotonic()
    gateway_s, driver_s = gateway.cpu_s()
    return Run(
        arrivals_s=arrivals_s,
        duration_s=end_s - start_s,
        gateway_cpu_s=gateway_s - cpu_s[0],
        driver_cpu_s=driver_s - cpu_s[1],
        client_cpu_s=time.process_time() - own_s,
        rss_before_mib=rss_before_mib,
        rss_after_mib=gateway.rss_mib(),
    )


def measure(*, streams: int, tokens: int, step_time_s: float) -> Run:
    """Start a gateway, run one round to warm up and one that counts."""
    with (
        running_gateway(streams=streams, step_time_s=step_time_s) as gateway,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(run_round(gateway, streams=streams, tokens=max(1, tokens // 4)))
        return runner.run(run_round(gateway, streams=streams, tokens=tokens))


def added_latency_s(arrivals_s: NDArray[np.float64], step_time_s: float) -> NDArray[np.float64]:
    """Return how long after the fastest token of its step each token was read.

    Steps end at ``origin + k * step_time_s``, the same for all streams; ``origin`` is not known. A stream's least delay
    against its own pace, modulo the step, is ``origin`` plus what its fastest token took. These lie on an arc of the
    circle of one step, and ``origin`` is where the arc begins: behind the widest gap.

    Shapes: arrivals_s and result [streams, tokens]
    """
    delays_s = arrivals_s - np.arange(arrivals_s.shape[1]) * step_time_s
    least_s = delays_s.min(axis=1)
    phases_s = np.sort(least_s % step_time_s)
    gaps_s = np.diff(phases_s, append=phases_s[0] + step_time_s)
    origin_s = phases_s[(int(gaps_s.argmax()) + 1) % len(phases_s)]
    behind_s = (least_s - origin_s) % step_time_s
    added: NDArray[np.float64] = delays_s - least_s[:, None] + behind_s[:, None]
    return added


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each stream")
    parser.add_argument("--load", type=float, default=0.5, help="share of the throughput at which latency is measured")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    streams, tokens = arguments.streams, arguments.tokens
    full = measure(streams=streams, tokens=tokens, step_time_s=0.0)
    show("throughput", full)
    ratio = full.tokens_per_s / LIMIT_TOKENS_PER_S
    print(f"at {streams} streams: {full.tokens_per_s:.0f} tokens/s, {ratio:.2f} of the limit of {LIMIT_TOKENS_PER_S}")
    step_time_s = streams / (full.tokens_per_s * arguments.load)
    paced = measure(streams=streams, tokens=tokens, step_time_s=step_time_s)
    show("latency", paced)
    # The first tokens come while requests are still being read: their step is not that of all.
    added_ms = added_latency_s(paced.arrivals_s[:, tokens // 4 :], step_time_s) * 1e3
    median_ms, p99_ms = (float(value) for value in np.percentile(added_ms, [50, 99]))
    print(
        f"added latency of a token at {streams / step_time_s:.0f} tokens/s: P50 {median_ms:.2f} ms,"
        f" P99 {p99_ms:.2f} ms, {p99_ms / LIMIT_ADDED_P99_MS:.2f} of the limit of {LIMIT_ADDED_P99_MS:.0f} ms"
    )
    if arguments.json:
        figures = {
            "streams": streams, "tokens": tokens, "limit_tokens_per_s": LIMIT_TOKENS_PER_S, "ratio_to_limit": ratio,
            "throughput": plain(full), "latency": plain(paced), "step_time_s": step_time_s,
            "added_latency_p50_ms": median_ms, "added_latency_p99_ms": p99_ms,
        }  # fmt: skip
        write_report(arguments.json, "gateway", figures)


def show(name: str, run: Run) -> None:
    """Print what a round took."""
    print(
        f"{name:>10}: {run.tokens_per_s:8.0f} tokens/s in {run.duration_s:.2f} s; processor seconds:"
        f" gateway {run.gateway_cpu_s:.2f}, driver {run.driver_cpu_s:.2f}, clients {run.client_cpu_s:.2f};"
        f" gateway memory {run.rss_before_mib:.1f} -> {run.rss_after_mib:.1f} MiB"
    )


def plain(run: Run) -> dict[str, Any]:
    """Return a round's figures without the arrivals."""
    figures = asdict(run)
    del figures["arrivals_s"]
    return {
        **figures,
        "tokens_per_s": run.tokens_per_s,
        "tokens_per_gateway_cpu_s": run.arrivals_s.size / run.gateway_cpu_s,
    }


if __name__ == "__main__":
    main()
