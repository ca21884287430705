"""The other ranks of a replica as processes of this host, started and ended by the driver; a ``Peers``.

Owns their command and their standard input, which ends when the driver does. What they do with the driver is
``bus_peers``'.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from ...comm.handshake import SECRET_VARIABLE, Identity
from ..handoff.settings import KvSeat
from .bus_peers import COMM_TIMEOUT_S, START_TIMEOUT_S, BusPeers
from .rank import RankSetup
from .rank_order import RankOrder, Seat

_HOST = "127.0.0.1"
"""All these ranks are processes of one host."""
_STOP_TIMEOUT_S = 5.0
_MODULE = "slipstream.runtime.worker.rank_main"


class RankProcesses(BusPeers):
    """The processes of ranks 1 and up; otherwise as ``BusPeers``."""

    def __init__(
        self,
        setup: RankSetup,
        *,
        kv_seat: KvSeat | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
        comm_timeout_s: float = COMM_TIMEOUT_S,
    ) -> None:
        """``kv_seat``: of all ranks, which are on one host, where KV is moved."""
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._kv_address = None if kv_seat is None else kv_seat.address
        # Ranks that speak to other replicas have to know the cluster's secret; else nobody else's is as good.
        self._secret = secrets.token_hex(32) if kv_seat is None else kv_seat.secret.decode()
        self._folder = tempfile.TemporaryDirectory(prefix="slipstream-")
        replica = f"replica-{os.getpid()}-{secrets.token_hex(4)}"
        super().__init__(
            setup,
            Identity(replica=replica, secret=self._secret.encode()),
            Seat(rank=0, address=_HOST, ranks_on_host=setup.mesh.size),
            bus=f"unix:{Path(self._folder.name) / 'steps'}",
            kv_bus=f"unix:{Path(self._folder.name) / 'kv'}",
            start_timeout_s=start_timeout_s,
            comm_timeout_s=comm_timeout_s,
        )

    @property
    def process_ids(self) -> dict[int, int]:
        """Each rank's process."""
        return {rank: process.pid for rank, process in self._processes.items()}

    def _call(self, order: RankOrder) -> None:
        for rank in range(1, order.setup.mesh.size):
            self._processes[rank] = self._start(rank, order)

    def _start(self, rank: int, order: RankOrder) -> subprocess.Popen[bytes]:
        seat = ["--rank", str(rank), "--address", _HOST, "--ranks-on-host", str(order.setup.mesh.size)]
        if self._kv_address is not None:
            seat += ["--kv-address", self._kv_address]
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE, *seat],
            stdin=subprocess.PIPE,
            # What a rank prints is for the log; the driver's own output is its gateway's.
            stdout=2,
            env={**os.environ, SECRET_VARIABLE: self._secret},
            # A session of its own: Ctrl-C in a terminal is for the driver, which then ends its ranks.
            start_new_session=True,
        )
        assert process.stdin is not None
        # Ends when this process does, and the rank with it. One that has ended already is noticed by that.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(order.to_json().encode() + b"\n")
            process.stdin.flush()
        return process

    def _ended(self, *, wait_s: float = 0.0) -> str | None:
        for rank, process in self._processes.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(wait_s)
                return f"rank {rank} (process {process.pid}) ended with status {status}"
        return None

    def _end(self, *, at_once: bool) -> None:
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.0 if at_once else _STOP_TIMEOUT_S)
            process.kill()
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
        self._folder.cleanup()
