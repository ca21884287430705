"""What every gateway's process does, whatever serves behind it: bind, serve HTTP, drain, end.

Owns signals and the order of starting and stopping. The first SIGTERM or SIGINT drains: what runs may finish within
``drain_timeout_s``, new requests get 503. A second one stops at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Protocol

import uvicorn
import uvloop
from prometheus_client import disable_created_metrics

from ...sdk.errors import ConfigError
from ..rpc.inference_server import InferenceServer
from .app import create_app
from .garbage import collect_seldom
from .gateway import Gateway
from .http_protocol import bounded_protocol
from .logs import log_as_json

logger = logging.getLogger(__name__)

LOOK_S = 0.02
"""How often is looked whether something has come to pass that nobody tells."""

LAST_BYTES_S = 2
_KEEP_ALIVE_S = 75
_BACKLOG = 2048


class Backend(Protocol):
    """What brings a gateway its replicas."""

    async def run(self) -> None:
        """Go on until ``stop``, or this is cancelled. Raises: what makes it pointless to serve"""
        ...

    async def stop(self, *, timeout_s: float) -> None:
        """Let go of the replicas; what is cut then ends with an error."""
        ...


class GatewayProcess:
    """One gateway from its first socket to its last, on the event loop that it is made on. ``inference``: its gRPC.

    ``announce`` runs beside it once it listens; ``told``: set when it has to drain and end, by a signal or by whoever
    has it.
    """

    def __init__(
        self,
        gateway: Gateway,
        backend: Backend,
        listening: socket.socket,
        *,
        drain_timeout_s: float,
        announce: Callable[[], Awaitable[None]],
        inference: InferenceServer | None = None,
    ) -> None:
        self._gateway = gateway
        self._backend = backend
        self._listening = listening
        self._drain_timeout_s = drain_timeout_s
        self._announce = announce
        self._inference = inference
        self.told = asyncio.Event()
        self._told_again = asyncio.Event()

    async def run(self) -> int:
        """Serve; return the exit status, 0 when everything had finished."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._note_signal)
        if self._inference is not None:
            logger.info("gRPC is served at %s", await self._inference.start())
        server = _Server(_uvicorn_config(self._gateway))
        collect_seldom()
        serving = asyncio.create_task(server.serve(sockets=[self._listening]), name="http")
        supervising = asyncio.create_task(self._backend.run(), name="backend")
        announcing = asyncio.create_task(self._announce_when_listening(server), name="announce")
        told = asyncio.create_task(self.told.wait(), name="signals")
        try:
            # The backend only ends by itself when there is nothing to serve.
            await asyncio.wait((told, supervising, serving), return_when=asyncio.FIRST_COMPLETED)
            if supervising.done():
                supervising.result()
            drained = await self._drain()
        finally:
            announcing.cancel()
            self._gateway.admission.close()
            await self._backend.stop(timeout_s=0.0 if self._told_again.is_set() else LAST_BYTES_S)
            if self._inference is not None:
                await self._inference.stop(grace_s=0.0 if self._told_again.is_set() else LAST_BYTES_S)
            server.should_exit = True
            server.force_exit = self._told_again.is_set()
            supervising.cancel()
            told.cancel()
            await asyncio.gather(serving, supervising, announcing, told, return_exceptions=True)
        return 0 if drained else 1

    def _note_signal(self) -> None:
        (self._told_again if self.told.is_set() else self.told).set()

    async def _announce_when_listening(self, server: uvicorn.Server) -> None:
        while not server.started:
            await asyncio.sleep(LOOK_S)
        await self._announce()

    async def _drain(self) -> bool:
        """Let what runs finish and refuse what comes; return whether everything has finished."""
        admission = self._gateway.admission
        admission.close()
        if self._inference is not None:
            await self._inference.set_serving(False)
        logger.info("stopping: %d prompts may still finish", admission.in_flight)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_timeout_s):
                while admission.in_flight and not self._told_again.is_set():
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._told_again.wait(), LOOK_S)
        return admission.in_flight == 0


def prepare_process(log_level: str) -> None:
    """Set up logs and metrics of a gateway's process."""
    log_as_json(log_level)
    disable_created_metrics()  # type: ignore[no-untyped-call]


def event_loop() -> asyncio.Runner:
    """Return what runs a gateway."""
    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """Bind before anything is loaded: an address in use should not cost the time of loading a model.

    Raises: ConfigError; OSError when the address cannot be had
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OverflowError as error:
        raise ConfigError("port", f"must be from 0 to 65535, got {port}") from error
    with listening:
        yield listening


def shown_address(listening: socket.socket) -> tuple[str, int]:
    """Return host and port of a socket as they stand in addresses."""
    host, port = listening.getsockname()[:2]
    return f"[{host}]" if ":" in host else host, port


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
        timeout_graceful_shutdown=LAST_BYTES_S,
    )
