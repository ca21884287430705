"""A gateway before an engine without a model, in a process of its own: what ``bench_gateway`` measures.

It is put together from the classes that ``slipstream serve`` uses and differs in two things: its driver is started with
``--null``, and its tokenizer is made up. Each token is a word that starts with ``~``, so that tokens can be counted in
an answer's bytes without taking it apart.

    python -P -m slipstream.benchmarks.null_gateway --step-time 0.05
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import uvicorn
import uvloop
from tokenizers import decoders, models, pre_tokenizers

from slipstream.runtime.clock import monotonic_clock, wall_clock
from slipstream.runtime.gateway.app import create_app
from slipstream.runtime.gateway.driver_process import DriverProcess
from slipstream.runtime.gateway.garbage import collect_seldom
from slipstream.runtime.gateway.gateway import make_gateway
from slipstream.runtime.gateway.http_protocol import bounded_protocol
from slipstream.runtime.gateway.inference import GatewayInference
from slipstream.runtime.gateway.logs import log_as_json
from slipstream.runtime.gateway.replica import Replica, model_text
from slipstream.runtime.gateway.settings import GatewaySettings, RequestLimits
from slipstream.runtime.gateway.supervisor import Supervisor
from slipstream.runtime.models.generation_defaults import GenerationDefaults
from slipstream.runtime.rpc.client import GrpcEngineClient
from slipstream.runtime.rpc.inference_server import InferenceServer
from slipstream.runtime.text.tokenizer import Tokenizer

VOCAB_SIZE = 32_000
MODEL_NAME = "null"
_START_TIMEOUT_S = 60.0


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: they would end the process before its driver has been stopped."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_tokenizer() -> Tokenizer:
    """Return a tokenizer of ``VOCAB_SIZE`` words, ~0 to ~7cff."""
    vocabulary = {f"~{token_id:x}": token_id for token_id in range(VOCAB_SIZE)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="~0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    # What most checkpoints have: decoding costs what it does for them.
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


async def serve(*, streams: int, step_time_s: float, listening: socket.socket, folder: Path) -> None:
    """Start a driver and serve before it until told to stop; print one line of JSON when the driver has been met."""
    replica = Replica(model_text(make_tokenizer(), GenerationDefaults()))
    limits = RequestLimits(max_concurrent_requests=streams + 16)
    settings = GatewaySettings(served_model_names=(MODEL_NAME,), limits=limits)
    gateway = make_gateway(settings, replica, clock=monotonic_clock, wall_clock=wall_clock)
    command = [
        *(sys.executable, "-P", "-m", "slipstream.runtime.worker.main", "--null", "--socket", str(folder / "driver")),
        *("--max-num-seqs", str(streams), "--max-num-batched-tokens", str(max(8192, 32 * streams))),
        *("--max-model-len", "4096", "--null-step-time", str(step_time_s), MODEL_NAME),
    ]  # fmt: skip

    inference = InferenceServer(GatewayInference(gateway), "127.0.0.1:0", max_requests=streams)
    grpc_port = int((await inference.start()).rpartition(":")[2])

    def announce() -> None:
        print(json.dumps({"port": listening.getsockname()[1], "grpc_port": grpc_port}), flush=True)

    supervisor = Supervisor(
        replica,
        launch=lambda: DriverProcess.start(command, timeout_s=_START_TIMEOUT_S),
        make_client=lambda address: GrpcEngineClient(address, max_live_requests=streams + 17),
        clock=monotonic_clock,
        on_ready=announce,
    )
    config = uvicorn.Config(
        create_app(gateway), http=bounded_protocol(gateway.settings.limits),
        ws="none", lifespan="off", access_log=False, log_config=None,
        server_header=False, timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = _Server(config)
    collect_seldom()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, setattr, server, "should_exit", True)
    supervising = asyncio.create_task(supervisor.run())
    try:
        await server.serve(sockets=[listening])
    finally:
        await supervisor.stop(timeout_s=1.0)
        await inference.stop(grace_s=0.0)
        supervising.cancel()
        await asyncio.gather(supervising, return_exceptions=True)


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, default=1000, help="sequences that run at once")
    parser.add_argument("--step-time", type=float, default=0.0, help="seconds that a step takes")
    arguments = parser.parse_args()
    # As serve does by default, but for the line a request, which would go to the benchmark's terminal.
    log_as_json("warning")
    with (
        socket.create_server(("127.0.0.1", 0), backlog=2048) as listening,
        tempfile.TemporaryDirectory(prefix="slipstream-") as folder,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(
            serve(streams=arguments.streams, step_time_s=arguments.step_time, listening=listening, folder=Path(folder))
        )


if __name__ == "__main__":
    main()
