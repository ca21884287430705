"""A rank's process: ``python -m slipstream.runtime.worker.rank_main``, started by its driver.

Reads one line of JSON from standard input (``RankOrder``), joins the groups, loads its part of the model, joins the
step bus, and carries out steps until the driver closes the bus. It ends with its driver: the bus is a socket, and
standard input is a pipe that ends when the driver's process does, whatever this one is doing.

Exit status: 0 when the driver closed the bus; 1 when a step or a peer failed; 2 for a wrong option or checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import TextIO

from ...comm.errors import CommError, CommTimeout, GroupClosed
from ...comm.groups import MeshGroups
from ...comm.handshake import Identity, secret_from
from ...comm.open_mesh import open_mesh_groups
from ...comm.step_endpoint import StepEndpoint, connect_rank
from ...comm.torch_groups import GroupSettings, Rendezvous
from ...sdk.errors import CheckpointError, ConfigError
from ..clock import monotonic_clock
from ..messages import StepResult
from .executor import ModelExecutor
from .rank import RankSetup, build_rank, rank_device
from .step_codec import PlanDecoder, encode_result

HOST = "127.0.0.1"
"""All ranks are processes of one host."""
EXIT_CLOSED, EXIT_FAILED, EXIT_REFUSED = 0, 1, 2

logger = logging.getLogger(__name__)

_IDLE_S = 3600.0
"""How long one wait for a step lasts; there may be no traffic for days, and an idle bus is no failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOrder:
    """What a driver tells a rank when it starts it.

    ``bus``: the step bus's address. ``rendezvous_port``: on this host, where the groups are opened.
    Units: timeout_s, seconds until everybody has to be there; comm_timeout_s, of a single exchange
    """

    rank: int
    replica: str
    bus: str
    rendezvous_port: int
    timeout_s: float
    comm_timeout_s: float
    setup: str

    def to_json(self) -> str:
        """Return the order as one line."""
        return json.dumps(asdict(self))


def main(order_file: TextIO = sys.stdin) -> int:
    """Run a rank until its driver needs it no more; return the exit status."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    order = RankOrder(**json.loads(order_file.readline()))
    setup = RankSetup.from_json(order.setup)
    _end_with_driver(order_file)
    try:
        rendezvous = Rendezvous.join(HOST, order.rendezvous_port, timeout_s=order.timeout_s)
        groups = join_groups(order, setup, rendezvous)
        rendezvous.close()
        try:
            return _serve(order, setup, groups)
        finally:
            groups.close()
    except (ConfigError, CheckpointError) as error:
        print(f"rank {order.rank}: error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except CommError as error:
        print(f"rank {order.rank}: {error}", file=sys.stderr)
        return EXIT_FAILED


def join_groups(order: RankOrder, setup: RankSetup, rendezvous: Rendezvous) -> MeshGroups:
    """Open a rank's groups with the others. Raises: CommError when not all come in time"""
    settings = GroupSettings(
        clock=monotonic_clock,
        host_address=HOST,
        device=rank_device(setup, order.rank),
        timeout_s=order.comm_timeout_s,
        open_timeout_s=order.timeout_s,
    )
    place = setup.mesh.place(order.rank)
    return open_mesh_groups(place, rendezvous, settings, experts_over_tp=setup.experts_over_tp)


def _serve(order: RankOrder, setup: RankSetup, groups: MeshGroups) -> int:
    rank = build_rank(setup, groups)
    try:
        identity = Identity(replica=order.replica, secret=secret_from(os.environ))
        endpoint = connect_rank(order.bus, identity, rank=order.rank, timeout_s=order.timeout_s, clock=monotonic_clock)
        try:
            return _Steps(rank.executor, endpoint, max_slots=setup.max_slots).run()
        finally:
            endpoint.close()
    finally:
        rank.executor.close()


class _Steps:
    """Takes steps from the bus, and answers them from a thread of its own, in order."""

    def __init__(self, executor: ModelExecutor, endpoint: StepEndpoint, *, max_slots: int) -> None:
        self._executor = executor
        self._endpoint = endpoint
        self._decoder = PlanDecoder(max_slots=max_slots)
        self._running: deque[tuple[int, Future[StepResult]]] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._failed = False

    def run(self) -> int:
        """Carry out steps until the bus is closed."""
        answering = threading.Thread(target=self._answer, name="slipstream-answers", daemon=True)
        answering.start()
        try:
            while True:
                try:
                    seq, payload = self._endpoint.next_step(_IDLE_S)
                except CommTimeout:
                    continue
                future = self._executor.submit(self._decoder.decode(payload))
                with self._changed:
                    # The bus lets the driver be only a few steps ahead: that bounds this queue.
                    self._running.append((seq, future))
                    self._changed.notify()
        except GroupClosed as closed:
            logger.info("%s", closed)
            return EXIT_FAILED if self._failed else EXIT_CLOSED
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify()

    def _answer(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._running or self._ended)
                if self._ended:
                    return
                seq, future = self._running.popleft()
            try:
                try:
                    payload = encode_result(future.result())
                except Exception as error:
                    # Whatever it was, the driver hears of it, and this rank ends: its groups' other ranks must not
                    # wait for it.
                    logger.exception("step %d failed", seq)
                    self._failed = True
                    self._endpoint.send_failure(seq, f"{type(error).__name__}: {error}")
                    self._endpoint.close("a step failed")
                    return
                else:
                    self._endpoint.send_result(seq, payload)
            except CommError as error:
                logger.info("the bus has ended: %s", error)
                return


def _end_with_driver(pipe: TextIO) -> None:
    """End this process when the driver's has ended: it may be in a wait that nobody else would end."""

    def watch() -> None:
        while pipe.read(4096):
            pass
        os._exit(EXIT_FAILED)

    threading.Thread(target=watch, name="slipstream-driver", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
