"""The gateway's process: binds, starts the driver, serves, drains, ends.

Owns signals and the order of starting and stopping. The first SIGTERM or SIGINT drains: what runs may finish within
``drain_timeout_s``, new requests get 503. A second one stops at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shlex
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn
import uvloop
from prometheus_client import disable_created_metrics

from ...sdk.errors import ConfigError
from ..clock import monotonic_clock, strftime_now, wall_clock
from ..config import EngineOptions
from ..models.generation_defaults import read_generation_defaults
from ..rpc.client import GrpcEngineClient
from ..text.tokenizer import Tokenizer
from .app import create_app
from .driver_process import DriverProcess, driver_command
from .garbage import collect_seldom
from .gateway import Gateway, make_gateway
from .http_protocol import bounded_protocol
from .logs import log_as_json
from .replica import Replica
from .responses import to_json
from .settings import GatewaySettings
from .supervisor import Supervisor

logger = logging.getLogger(__name__)

_DRAIN_LOOK_S = 0.02
_LAST_BYTES_S = 2
_KEEP_ALIVE_S = 75
_BACKLOG = 2048


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
    log_as_json(options.log_level)
    disable_created_metrics()  # type: ignore[no-untyped-call]
    directory = Path(options.engine.tokenizer or options.engine.model).expanduser()
    replica = Replica(
        tokenizer=Tokenizer.from_directory(directory, strftime_now=strftime_now),
        defaults=read_generation_defaults(Path(options.engine.model).expanduser()),
        seed=options.engine.seed,
    )
    with (
        _bound(options.host, options.port) as listening,
        tempfile.TemporaryDirectory(prefix="slipstream-") as folder,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(_run(options, replica, listening, Path(folder), announce))


async def _run(
    options: ServeOptions, replica: Replica, listening: socket.socket, folder: Path, announce: Callable[[str], None]
) -> int:
    return await _Process(options, replica, listening, folder, announce).run()


class _Process:
    """One gateway from its first socket to its last."""

    def __init__(
        self, options: ServeOptions, replica: Replica, listening: socket.socket, folder: Path,
        announce: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._options = options
        self._announce = announce
        self._listening = listening
        self._folder = folder
        self._gateway: Gateway = make_gateway(options.settings, replica, clock=monotonic_clock, wall_clock=wall_clock)
        self._supervisor = Supervisor(
            replica,
            launch=self._launch,
            make_client=self._client,
            clock=monotonic_clock,
            on_ready=self._gateway.metrics.engine_starts.inc,
        )
        self._signals = _Signals()
        self._drivers = 0

    async def run(self) -> int:
        """Serve; return the exit status."""
        self._signals.listen()
        server = _Server(_uvicorn_config(self._gateway))
        collect_seldom()
        serving = asyncio.create_task(server.serve(sockets=[self._listening]), name="http")
        supervising = asyncio.create_task(self._supervisor.run(), name="supervisor")
        announcing = asyncio.create_task(self._announce_when_ready(), name="announce")
        told = asyncio.create_task(self._signals.first.wait(), name="signals")
        try:
            # The supervisor only ends by itself when its first driver did not start: then there is nothing to serve.
            await asyncio.wait((told, supervising, serving), return_when=asyncio.FIRST_COMPLETED)
            if supervising.done():
                supervising.result()
            drained = await self._drain()
        finally:
            announcing.cancel()
            self._gateway.admission.draining = True
            await self._supervisor.stop(timeout_s=0.0 if self._signals.second.is_set() else _LAST_BYTES_S)
            server.should_exit = True
            server.force_exit = self._signals.second.is_set()
            supervising.cancel()
            told.cancel()
            await asyncio.gather(serving, supervising, announcing, told, return_exceptions=True)
        return 0 if drained else 1

    async def _drain(self) -> bool:
        """Let what runs finish and refuse what comes; return whether everything has finished."""
        admission = self._gateway.admission
        admission.draining = True
        logger.info("stopping: %d prompts may still finish", admission.in_flight)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._options.drain_timeout_s):
                while admission.in_flight and not self._signals.second.is_set():
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._signals.second.wait(), _DRAIN_LOOK_S)
        return admission.in_flight == 0

    async def _launch(self) -> DriverProcess:
        # A new socket for each driver: the last one may have left its file behind.
        self._drivers += 1
        path = self._folder / f"driver-{self._drivers}.sock"
        command = driver_command(self._options.engine, path, drain_timeout_s=_LAST_BYTES_S)
        return await DriverProcess.start(command, timeout_s=self._options.start_timeout_s)

    def _client(self, address: str) -> GrpcEngineClient:
        # One more than clients may have: the readiness probe must not be refused by them.
        return GrpcEngineClient(address, max_live_requests=self._options.settings.limits.max_concurrent_requests + 1)

    async def _announce_when_ready(self) -> None:
        """Say that the server is ready when it is: once, after a token was generated."""
        while not self._gateway.replica.attached or await self._gateway.readiness.problem() is not None:
            await asyncio.sleep(_DRAIN_LOOK_S)
        host, port = self._listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        shown = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(shown, shown)
        url = f"http://{shown}:{port}/v1"
        name = self._options.settings.model_name
        key = " -H 'authorization: Bearer KEY'" if self._options.settings.api_keys else ""
        body = shlex.quote(to_json({"model": name, "prompt": "Hello", "max_tokens": 16}).decode())
        curl = f"curl {url}/completions -H 'content-type: application/json'{key} -d {body}"
        self._announce(f"slipstream serves {name} at {url}   try: {curl}")


class _Signals:
    """The first SIGTERM or SIGINT, and the second."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def listen(self) -> None:
        """Note signals from now on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._note)

    def _note(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: it would stop listening at once, and new requests are to get a 503."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _uvicorn_config(gateway: Gateway) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(gateway),
        http=bounded_protocol(gateway.settings.limits),
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_LAST_BYTES_S,
    )


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """Bind before anything is loaded: an address in use should not cost the time of loading a model."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OverflowError as error:
        raise ConfigError("port", f"must be from 0 to 65535, got {port}") from error
    with listening:
        yield listening
