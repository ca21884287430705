"""Where the controller tells gateways who serves: views over gRPC, on a thread with an event loop of its own.

Owns the port, which is the same after the controller was started again: until the process before has let go of it, it
is tried again. Never on a request's way: gateways that hear nothing go on with the last view.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading

from ...sdk.errors import ConfigError
from ..reconcile.actions import StartGang, StopRank, Unroute
from ..reconcile.observed import Observed
from ..reconcile.views import View
from ..rpc.tls import Tls
from ..rpc.view_server import ViewServer
from ..rpc.view_source import ViewBoard
from ..rpc.wire import one_host_of
from .cluster import Cluster

logger = logging.getLogger(__name__)

_TRY_PERIOD_S = 0.2
_CLOSE_TIMEOUT_S = 10.0


class ViewPort:
    """Serves views at one address until it is closed. ``secret``: what watchers over TCP have to know, ``tls``:
    certificates for them.

    Raises: ConfigError naming ``address`` when it can be no server's
    """

    def __init__(self, address: str, *, secret: bytes | None = None, tls: Tls | None = None) -> None:
        # Found wrong here rather than on the thread, where nobody would be told.
        one_host_of(address)
        self._wanted = address
        self._secret = secret
        self._tls = tls
        self._loop = asyncio.new_event_loop()
        self._board = ViewBoard()
        self._address = ""
        self._problem = ""
        self._up = threading.Event()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="slipstream-views", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str:
        """Why nobody can watch at the moment, "" once the port is had."""
        return self._problem

    def address(self, *, timeout_s: float) -> str:
        """Wait until the port is had, and return the address. Raises: TimeoutError saying what stands in the way"""
        if not self._up.wait(timeout_s):
            raise TimeoutError(f"{self._wanted} could not be had within {timeout_s:g} s: {self._problem}")
        return self._address

    def publish(self, view: View) -> None:
        """Show a view to whoever watches, unless a newer one was shown; any thread. Idempotent."""
        # A port that is closed has nobody to show it to.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._board.publish, view)

    def close(self) -> None:
        """End all watches and let go of the port. Idempotent."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join(_CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        while not self._closing.is_set():
            server = ViewServer(self._board, self._wanted, secret=self._secret, tls=self._tls)
            try:
                self._address = await server.start()
            except ConfigError as error:
                self._note(str(error))
                await self._closing_within(_TRY_PERIOD_S)
                continue
            self._problem = ""
            self._up.set()
            logger.info("views are published at %s", self._address)
            await self._closing.wait()
            await server.stop()

    def _note(self, problem: str) -> None:
        if problem != self._problem:
            self._problem = problem
            logger.warning("nobody can watch views yet, it is tried again: %s", problem)

    async def _closing_within(self, pause_s: float) -> None:
        try:
            async with asyncio.timeout(pause_s):
                await self._closing.wait()
        except TimeoutError:
            return


class WatchedCluster:
    """A cluster whose views are shown at a port as well: those that are published, and those that others published."""

    def __init__(self, cluster: Cluster, port: ViewPort) -> None:
        self._cluster = cluster
        self._port = port

    def observe(self) -> Observed:
        """Return what is there now."""
        observed = self._cluster.observe()
        self._port.publish(observed.view)
        return observed

    def start(self, gang: StartGang) -> None:
        """Claim an incarnation and start all its ranks."""
        self._cluster.start(gang)

    def stop(self, stop: StopRank) -> None:
        """End a rank."""
        self._cluster.stop(stop)

    def unroute(self, unroute: Unroute) -> None:
        """Let a driver admit nothing more."""
        self._cluster.unroute(unroute)

    def publish(self, view: View) -> None:
        """Keep a view, then show it: what was refused is never shown."""
        self._cluster.publish(view)
        self._port.publish(view)
