"""The other ranks of a replica as processes of this host, started and ended by the driver.

Owns their command, their standard input (which ends when the driver does), the step bus to them and the groups with
them. A rank that ends takes the replica with it: whoever supervises the driver starts all of them anew.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import TypeVar

from ...comm.errors import CommError, CommTimeout, PeerLost
from ...comm.groups import MeshGroups
from ...comm.handshake import SECRET_VARIABLE, Identity
from ...comm.step_bus import StepHub
from ...comm.step_listener import StepListener
from ...comm.torch_groups import Rendezvous
from ...comm.wire import BusLimits
from ...sdk.errors import EngineError
from ..clock import monotonic_clock
from ..messages import StepPlan, StepResult
from .rank import RankSetup
from .rank_main import HOST, RankOrder, join_groups
from .step_codec import PlanEncoder, decode_result

START_TIMEOUT_S = 600.0
COMM_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 5.0
_CHECK_PERIOD_S = 0.2
_REASON_TIMEOUT_S = 2.0
_END_TIMEOUT_S = 0.3
_MODULE = "slipstream.runtime.worker.rank_main"

_T = TypeVar("_T")


class RankProcesses:
    """The processes of ranks 1 and up; a ``Peers``.

    Units: start_timeout_s, until all ranks are ready; comm_timeout_s, that a rank waits for another in a step
    Raises: EngineError naming the rank that did not come
    """

    def __init__(
        self, setup: RankSetup, *, start_timeout_s: float = START_TIMEOUT_S, comm_timeout_s: float = COMM_TIMEOUT_S
    ) -> None:
        self._start_timeout_s = start_timeout_s
        # A rank that is behind the driver's waits for others, at each stage as long as one exchange may take.
        self._patience_s = comm_timeout_s * (setup.pp + 1)
        # As many steps as there are stages are on their way, and one that is being sent.
        self._limits = BusLimits(max_ahead=max(BusLimits().max_ahead, setup.pp + 2))
        self._encoder = PlanEncoder(max_slots=setup.max_slots)
        self._on_their_way: deque[int] = deque()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._hub: StepHub | None = None
        self._opened = contextlib.ExitStack()
        self._secret = secrets.token_hex(32)
        self._replica = f"replica-{os.getpid()}-{secrets.token_hex(4)}"
        shape = setup.mesh
        self._speakers = shape.place(0).pp_ranks[1:]
        try:
            folder = self._opened.enter_context(tempfile.TemporaryDirectory(prefix="slipstream-"))
            self._listener = self._opened.enter_context(StepListener(f"unix:{Path(folder) / 'steps'}"))
            rendezvous = Rendezvous.host(HOST, timeout_s=start_timeout_s)
            self._opened.callback(rendezvous.close)
            orders = [
                RankOrder(
                    rank=rank,
                    replica=self._replica,
                    bus=self._listener.address,
                    rendezvous_port=rendezvous.port,
                    timeout_s=start_timeout_s,
                    comm_timeout_s=comm_timeout_s,
                    setup=setup.to_json(),
                )
                for rank in range(shape.size)
            ]
            for order in orders[1:]:
                self._processes[order.rank] = self._start(order)
            self.groups: MeshGroups = self._while_they_live(lambda: join_groups(orders[0], setup, rendezvous))
            self._opened.callback(self.groups.close)
        except BaseException:
            self.close()
            raise

    def wait_ready(self) -> None:
        """Wait until every rank has loaded its part and has joined the bus."""
        identity = Identity(replica=self._replica, secret=self._secret.encode())
        self._hub = self._while_they_live(
            lambda: self._listener.gather(
                identity,
                ranks=self._processes,
                timeout_s=self._start_timeout_s,
                clock=monotonic_clock,
                limits=self._limits,
            )
        )

    def send(self, plan: StepPlan) -> None:
        """Give a step to every rank."""
        assert self._hub is not None, "wait_ready comes first"
        try:
            self._on_their_way.append(self._hub.send_step(self._encoder.encode(plan)))
        except CommError as error:
            raise self._failed(error) from error

    def result(self, plan: StepPlan) -> list[StepResult]:
        """Wait until every rank has carried out the oldest step."""
        assert self._hub is not None, "wait_ready comes first"
        seq = self._on_their_way.popleft()
        try:
            answers = self._hub.result(seq, self._patience_s)
        except CommError as error:
            raise self._failed(error) from error
        return [decode_result(answers[rank]) for rank in self._speakers]

    def why(self) -> str | None:
        """Return what the other ranks say of a failure."""
        if self._hub is None or not self._on_their_way:
            return None
        try:
            self._hub.result(self._on_their_way[0], _REASON_TIMEOUT_S)
        except CommTimeout:
            return self._ended()
        except CommError as error:
            return str(self._failed(error))
        return None

    def close(self) -> None:
        """End the bus, the groups and the processes."""
        if self._hub is not None:
            self._hub.close()
        self._opened.close()
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_TIMEOUT_S if self._hub is not None else 0.0)
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()

    @property
    def process_ids(self) -> dict[int, int]:
        """Each rank's process."""
        return {rank: process.pid for rank, process in self._processes.items()}

    def _start(self, order: RankOrder) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE],
            stdin=subprocess.PIPE,
            # What a rank prints is for the log; the driver's own output is its gateway's.
            stdout=2,
            env={**os.environ, SECRET_VARIABLE: self._secret},
            # A session of its own: Ctrl-C in a terminal is for the driver, which then ends its ranks.
            start_new_session=True,
        )
        assert process.stdin is not None
        # Ends when this process does, and the rank with it.
        process.stdin.write(order.to_json().encode() + b"\n")
        process.stdin.flush()
        return process

    def _while_they_live(self, wait: Callable[[], _T]) -> _T:
        """Wait for the ranks, and give up as soon as one has ended.

        Raises: EngineError naming the rank
        """
        future: Future[_T] = Future()

        def run() -> None:
            try:
                future.set_result(wait())
            except BaseException as error:
                future.set_exception(error)

        # Not joined when a rank has ended: it waits for that one until its own deadline.
        threading.Thread(target=run, name="slipstream-meeting", daemon=True).start()
        while True:
            try:
                return future.result(_CHECK_PERIOD_S)
            except FutureTimeoutError as error:
                if (ended := self._ended()) is not None:
                    raise EngineError(f"{ended} before the replica was ready; its last lines say why") from error
            except CommError as error:
                raise self._failed(error) from error

    def _failed(self, error: CommError) -> EngineError:
        # A socket ends a moment before its process has.
        ended = self._ended(wait_s=_END_TIMEOUT_S if isinstance(error, PeerLost) else 0.0)
        return EngineError(f"{error}; {ended}" if ended else str(error))

    def _ended(self, *, wait_s: float = 0.0) -> str | None:
        """Return which rank has ended, if any; each is waited for."""
        for rank, process in self._processes.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(wait_s)
                return f"rank {rank} (process {process.pid}) ended with status {status}"
        return None
