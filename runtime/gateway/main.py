"""The gateway's process of ``slipstream serve``: it starts its own driver, or several, and keeps them running."""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...comm.handshake import SECRET_VARIABLE
from ...placement.plan import Role
from ..clock import monotonic_clock, wall_clock
from ..config import EngineOptions
from ..driver_command import role_arguments
from ..rpc.client import GrpcEngineClient
from ..rpc.tls import tls_from
from ..rpc.view_source import InProcessViewWatch, ViewBoard
from .driver_process import DriverProcess, driver_command
from .gateway import Gateway, make_gateway
from .inference import grpc_server
from .local_pools import LocalPools, LocalSplit
from .model_files import read_model_text
from .process import LAST_BYTES_S, LOOK_S, GatewayProcess, bound, event_loop, prepare_process, shown_address
from .replica import ModelText, Replica
from .replica_set import ReplicaSet
from .responses import to_json
from .settings import GatewaySettings
from .supervisor import Supervisor

_LOOPBACK = "127.0.0.1"
_SECRET_BYTES = 32
_THREADS_VARIABLE = "OMP_NUM_THREADS"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Everything that ``slipstream serve`` is told. ``split``: several replicas of which each has one part to do."""

    host: str
    port: int
    engine: EngineOptions
    settings: GatewaySettings
    start_timeout_s: float = 1800.0
    drain_timeout_s: float = 60.0
    log_level: str = "info"
    grpc_port: int | None = None
    split: LocalSplit | None = None


def serve(options: ServeOptions, *, announce: Callable[[str], None]) -> int:
    """Serve until told to stop; return the exit status, 0 when everything had finished.

    ``announce`` gets one line when the first token has been generated.
    Raises: ConfigError; CheckpointError; OSError when the address cannot be bound
    """
    prepare_process(options.log_level)
    text = read_model_text(options.engine.model, tokenizer=options.engine.tokenizer)
    with (
        bound(options.host, options.port) as listening,
        tempfile.TemporaryDirectory(prefix="slipstream-") as folder,
        event_loop() as runner,
    ):
        run = _run if options.split is None else _run_split
        return runner.run(run(options, text, listening, _Launcher(options, Path(folder)), announce))


async def _run(
    options: ServeOptions,
    text: ModelText,
    listening: socket.socket,
    launcher: _Launcher,
    announce: Callable[[str], None],
) -> int:
    replica = Replica(text, seed=options.engine.seed)
    gateway = make_gateway(options.settings, replica, clock=monotonic_clock, wall_clock=wall_clock)
    supervisor = Supervisor(
        replica,
        launch=launcher.launch,
        make_client=_client_maker(options),
        clock=monotonic_clock,
        on_ready=gateway.metrics.engine_starts.inc,
    )

    async def announce_when_ready() -> None:
        await _until_ready(gateway, lambda: replica.attached)
        announce(_how_to_ask(gateway, listening))

    process = GatewayProcess(
        gateway,
        supervisor,
        listening,
        drain_timeout_s=options.drain_timeout_s,
        announce=announce_when_ready,
        inference=grpc_server(gateway, options.host, options.grpc_port, tls=tls_from(os.environ)),
    )
    return await process.run()


async def _run_split(
    options: ServeOptions,
    text: ModelText,
    listening: socket.socket,
    launcher: _Launcher,
    announce: Callable[[str], None],
) -> int:
    assert options.split is not None
    board = ViewBoard()

    async def read_model(model: str, generation: int) -> ModelText:
        del model, generation
        return text

    replicas = ReplicaSet(
        InProcessViewWatch(board),
        make_client=_client_maker(options),
        read_model=read_model,
        clock=monotonic_clock,
        # There is one gateway: nobody else would try at the same time.
        jitter=lambda pause_s: pause_s,
        seed=options.engine.seed,
        split_from_tokens=options.split.split_from_tokens,
        on_ready=lambda: gateway.metrics.engine_starts.inc(),
    )
    gateway = make_gateway(options.settings, replicas, clock=monotonic_clock, wall_clock=wall_clock)
    pools = LocalPools(
        options.split.pools,
        engine=options.engine,
        launch=launcher.launch_replica,
        make_client=_client_maker(options),
        board=board,
        replicas=replicas,
        clock=monotonic_clock,
    )

    async def announce_when_ready() -> None:
        await _until_ready(gateway, lambda: pools.whole and replicas.attached)
        announce(_how_to_ask(gateway, listening))

    process = GatewayProcess(
        gateway,
        pools,
        listening,
        drain_timeout_s=options.drain_timeout_s,
        announce=announce_when_ready,
        inference=grpc_server(gateway, options.host, options.grpc_port, tls=tls_from(os.environ)),
    )
    return await process.run()


async def _until_ready(gateway: Gateway, there: Callable[[], bool]) -> None:
    while not there() or (await gateway.readiness.look()).problem is not None:
        await asyncio.sleep(LOOK_S)


def _client_maker(options: ServeOptions) -> Callable[[str], GrpcEngineClient]:
    # One more than clients may have: the readiness probe must not be refused by them.
    return lambda address: GrpcEngineClient(
        address, max_live_requests=options.settings.limits.max_concurrent_requests + 1
    )


class _Launcher:
    """Starts one driver after the other; those of a split share a secret that nobody else has, and the cores."""

    def __init__(self, options: ServeOptions, folder: Path) -> None:
        self._options = options
        self._folder = folder
        self._drivers = 0
        self._secret = secrets.token_hex(_SECRET_BYTES)

    async def launch(self) -> DriverProcess:
        """Start the driver that does all."""
        return await self._start(())

    async def launch_replica(self, replica: str, role: Role) -> DriverProcess:
        """Start the driver of one replica of several."""
        split = self._options.split
        assert split is not None
        arguments = role_arguments(
            role,
            kv_transport=split.kv_transport,
            kv_address=_LOOPBACK,
            across_hosts=False,
            transfer_dtype=split.kv_transfer_dtype,
        )
        environment = {SECRET_VARIABLE: self._secret}
        if _THREADS_VARIABLE not in os.environ:
            # Otherwise each would compute with a thread for every core, and wait for those of the others.
            environment[_THREADS_VARIABLE] = str(max(1, (os.cpu_count() or 1) // split.replicas))
        return await self._start(("--replica", replica, *arguments), environment)

    async def _start(self, role: Sequence[str], environment: Mapping[str, str] | None = None) -> DriverProcess:
        # A new socket for each driver: the last one may have left its file behind.
        self._drivers += 1
        path = self._folder / f"driver-{self._drivers}.sock"
        command = driver_command(self._options.engine, path, drain_timeout_s=LAST_BYTES_S, role=role)
        return await DriverProcess.start(command, timeout_s=self._options.start_timeout_s, environment=environment)


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
