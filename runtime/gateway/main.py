"""The gateway's process of ``slipstream serve``: it starts its own driver, and keeps one running."""

from __future__ import annotations

import asyncio
import shlex
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..clock import monotonic_clock, wall_clock
from ..config import EngineOptions
from ..rpc.client import GrpcEngineClient
from .driver_process import DriverProcess, driver_command
from .gateway import Gateway, make_gateway
from .model_files import read_model_text
from .process import LAST_BYTES_S, LOOK_S, GatewayProcess, bound, event_loop, prepare_process, shown_address
from .replica import Replica
from .responses import to_json
from .settings import GatewaySettings
from .supervisor import Supervisor


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Everything that ``slipstream serve`` is told."""

    host: str
    port: int
    engine: EngineOptions
    settings: GatewaySettings
    start_timeout_s: float = 1800.0
    drain_timeout_s: float = 60.0
    log_level: str = "info"


def serve(options: ServeOptions, *, announce: Callable[[str], None]) -> int:
    """Serve until told to stop; return the exit status, 0 when everything had finished.

    ``announce`` gets one line when the first token has been generated.
    Raises: ConfigError; CheckpointError; OSError when the address cannot be bound
    """
    prepare_process(options.log_level)
    text = read_model_text(options.engine.model, tokenizer=options.engine.tokenizer)
    replica = Replica(text, seed=options.engine.seed)
    with (
        bound(options.host, options.port) as listening,
        tempfile.TemporaryDirectory(prefix="slipstream-") as folder,
        event_loop() as runner,
    ):
        return runner.run(_run(options, replica, listening, Path(folder), announce))


async def _run(
    options: ServeOptions, replica: Replica, listening: socket.socket, folder: Path, announce: Callable[[str], None]
) -> int:
    gateway = make_gateway(options.settings, replica, clock=monotonic_clock, wall_clock=wall_clock)
    supervisor = Supervisor(
        replica,
        launch=_Launcher(options, folder).launch,
        # One more than clients may have: the readiness probe must not be refused by them.
        make_client=lambda address: GrpcEngineClient(
            address, max_live_requests=options.settings.limits.max_concurrent_requests + 1
        ),
        clock=monotonic_clock,
        on_ready=gateway.metrics.engine_starts.inc,
    )

    async def announce_when_ready() -> None:
        while not replica.attached or await gateway.readiness.problem() is not None:
            await asyncio.sleep(LOOK_S)
        announce(_how_to_ask(gateway, listening))

    process = GatewayProcess(
        gateway, supervisor, listening, drain_timeout_s=options.drain_timeout_s, announce=announce_when_ready
    )
    return await process.run()


class _Launcher:
    """Starts one driver after the other."""

    def __init__(self, options: ServeOptions, folder: Path) -> None:
        self._options = options
        self._folder = folder
        self._drivers = 0

    async def launch(self) -> DriverProcess:
        # A new socket for each driver: the last one may have left its file behind.
        self._drivers += 1
        path = self._folder / f"driver-{self._drivers}.sock"
        command = driver_command(self._options.engine, path, drain_timeout_s=LAST_BYTES_S)
        return await DriverProcess.start(command, timeout_s=self._options.start_timeout_s)


def _how_to_ask(gateway: Gateway, listening: socket.socket) -> str:
    """Say where the server is, and how to try it."""
    host, port = shown_address(listening)
    shown = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    url = f"http://{shown}:{port}/v1"
    name = gateway.settings.model_name
    key = " -H 'authorization: Bearer KEY'" if gateway.settings.api_keys else ""
    body = shlex.quote(to_json({"model": name, "prompt": "Hello", "max_tokens": 16}).decode())
    curl = f"curl {url}/completions -H 'content-type: application/json'{key} -d {body}"
    return f"slipstream serves {name} at {url}   try: {curl}"
