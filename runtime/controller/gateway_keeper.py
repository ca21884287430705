"""Keeps one gateway: its process, started again whenever it ends, after a pause that grows. What an actor holds.

Keys that clients need go into a file that only this user can read, which is there as long as the process is: they are
in no argument and in no environment.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from ..clock import Clock
from ..rpc.backoff import Backoff
from .private_file import write_private
from .process_log import LogPage
from .rank_process import RankProcess

_LOOK_PERIOD_S = 0.2
_JOIN_TIMEOUT_S = 20.0
_EVERY_ADDRESS = ("0.0.0.0", "[::]")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayOrder:
    """One gateway as it should be: ``python -P -m module --host .. --port .. --watch .. arguments``.

    ``node``: where, by its name. ``host``: what it listens on, its node's own address if empty. ``api_keys``: those
    that are let in, all if empty.
    """

    name: str
    node: str
    host: str
    port: int
    watch: tuple[str, ...]
    module: str
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    drain_s: float = 60.0


class GatewayState(StrEnum):
    """Where a gateway is in its life."""

    STARTING = "starting"
    READY = "ready"  # it listens
    PAUSED = "paused"  # its process has ended, and another one will be started
    UNKNOWN = "unknown"  # whoever keeps it does not answer


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayReport:
    """What a keeper says of its gateway. ``address``: where clients reach it; ``detail``: how the last one ended."""

    name: str
    node: str = ""
    state: GatewayState = GatewayState.UNKNOWN
    address: str = ""
    pid: int = 0
    starts: int = 0
    detail: str = ""


class GatewayKeeper:
    """Runs one gateway until it is ended.

    ``node``: where this is, by name; ``own_address``: the node's, shown where the gateway listens on all.
    """

    def __init__(self, order: GatewayOrder, *, node: str, own_address: str, clock: Clock) -> None:
        self._order = order
        self._node = node
        self._own_address = own_address
        self._clock = clock
        self._process: RankProcess | None = None
        self._starts = 0
        self._detail = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="slipstream-gateway", daemon=True)
        self._thread.start()

    def report(self) -> GatewayReport:
        """Return how the gateway is now."""
        process = self._process
        state = GatewayState.PAUSED
        if process is not None and process.ended() is None:
            state = GatewayState.READY if process.ready else GatewayState.STARTING
        elif self._starts == 0 and not self._detail:
            state = GatewayState.STARTING
        return GatewayReport(
            name=self._order.name,
            node=self._node,
            state=state,
            address=self._shown(process.address) if process is not None else "",
            pid=process.pid if process is not None else 0,
            starts=self._starts,
            detail=self._detail,
        )

    def log(self, begin: int) -> LogPage:
        """Return what the process that runs, or the last one, has printed from a line on; see ``ProcessLog.page``."""
        process = self._process
        return process.log.page(begin) if process is not None else LogPage()

    def end(self, *, drain_s: float) -> None:
        """End the gateway; what runs may finish within so long. Idempotent."""
        self._closing.set()
        # After this no other process is started.
        self._thread.join(_JOIN_TIMEOUT_S)
        if self._process is None:
            return
        if drain_s > 0:
            self._process.ask_to_end()
            self._process.wait_ended(drain_s)
        self._process.end()

    def _keep(self) -> None:
        backoff = Backoff()
        with tempfile.TemporaryDirectory(prefix="slipstream-gateway-") as folder:
            while not self._closing.is_set():
                began_s = self._clock()
                try:
                    self._process = RankProcess(self._order.module, self._arguments(folder), self._order.environment)
                    self._starts += 1
                except OSError as error:
                    self._detail = f"its process could not be started: {error}"
                else:
                    self._detail = self._until_ended(self._process) or self._detail
                if not self._closing.is_set():
                    pause_s = backoff.pause_s(lasted_s=self._clock() - began_s)
                    self._closing.wait(pause_s)

    def _until_ended(self, process: RankProcess) -> str:
        """Wait until a process has ended by itself, or is to; return how, "" where it was to."""
        while process.wait_ended(_LOOK_PERIOD_S) is None:
            if self._closing.is_set():
                return ""
        ended = process.ended() or ""
        # What it has started itself is ended with it: the next one needs its port.
        process.end()
        return "" if self._closing.is_set() else ended

    def _arguments(self, folder: str) -> list[str]:
        order = self._order
        arguments = ["--host", order.host or self._own_address, "--port", str(order.port)]
        for address in order.watch:
            arguments += ["--watch", address]
        if order.api_keys:
            keys = Path(folder) / "api-keys"
            write_private(keys, "\n".join(order.api_keys) + "\n")
            arguments += ["--api-key-file", str(keys)]
        return [*arguments, *order.arguments]

    def _shown(self, address: str) -> str:
        host, _, port = address.rpartition(":")
        return f"{self._own_address}:{port}" if host in _EVERY_ADDRESS else address
