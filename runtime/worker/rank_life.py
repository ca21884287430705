"""A rank other than the driver's: it joins its replica, loads its part of the model, and carries out steps.

The step bus comes first, so that from then on driver and rank hear of each other's end. Once all ranks have come, the
driver's first step asks each whether it has loaded its part, and when all have, its second whether it takes steps; the
answer comes when it has, or does, or says why it cannot. Knows nothing of who has started the process.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, suppress

from ...comm.errors import CommError, CommTimeout, GroupClosed
from ...comm.groups import MeshGroups
from ...comm.handshake import Identity, secret_from
from ...comm.open_mesh import open_mesh_groups
from ...comm.step_endpoint import StepEndpoint, connect_rank
from ...comm.torch_groups import GroupSettings, Rendezvous
from ...comm.wire import Deadline
from ..clock import monotonic_clock
from ..handoff.rank_control import RankControl
from ..handoff.rank_kv import RankKv
from ..handoff.settings import KvSeat
from ..messages import StepResult
from ..models.weights import Progress
from .executor import ModelExecutor
from .rank import Rank, build_rank, rank_device
from .rank_order import RankOrder, Seat
from .step_codec import PlanDecoder, encode_result

logger = logging.getLogger(__name__)

_IDLE_S = 3600.0
"""How long one wait for a step lasts; there may be no traffic for days, and an idle bus is no failure."""


def live(
    order: RankOrder,
    seat: Seat,
    *,
    progress: Progress | None = None,
    on_ready: Callable[[], None] = lambda: None,
) -> bool:
    """Be a rank until the driver closes the bus; return False when it was closed because a step failed here.

    ``progress`` is told how much of the weights is loaded, ``on_ready`` is called when steps are taken.

    Raises: ConfigError, CheckpointError; CommError when the driver or another rank is lost, or does not come in time
    """
    deadline = Deadline(order.timeout_s, monotonic_clock)
    identity = Identity(replica=order.replica, secret=secret_from(os.environ))
    endpoint = connect_rank(order.bus, identity, rank=seat.rank, timeout_s=order.timeout_s, clock=monotonic_clock)
    try:
        start = _Start(endpoint, deadline)
        start.hear()
        try:
            rank = _build(order, seat, deadline, progress, start.meet)
        except Exception as error:
            # Whatever it was, the driver hears of it before this rank's end.
            start.refuse(error)
            raise
        with ExitStack() as closing:
            if rank.kv is not None:
                closing.callback(rank.kv.close)
            closing.callback(rank.executor.close)
            if rank.kv is not None:
                closing.callback(_hear_orders(order, identity, rank.kv, start, deadline).close)
            start.answer()
            on_ready()
            return _Steps(rank.executor, endpoint, max_slots=order.setup.max_slots).run()
    finally:
        endpoint.close()


def join_groups(order: RankOrder, seat: Seat, rendezvous: Rendezvous, *, timeout_s: float) -> MeshGroups:
    """Open a rank's groups with the others. Raises: CommError when not all come in time"""
    settings = GroupSettings(
        clock=monotonic_clock,
        host_address=seat.address,
        device=rank_device(order.setup, seat.rank),
        timeout_s=order.comm_timeout_s,
        open_timeout_s=timeout_s,
    )
    place = order.setup.mesh.place(seat.rank)
    return open_mesh_groups(place, rendezvous, settings, experts_over_tp=order.setup.experts_over_tp)


def _build(
    order: RankOrder, seat: Seat, deadline: Deadline, progress: Progress | None, meet: Callable[[], None]
) -> Rank:
    rendezvous = Rendezvous.join(order.rendezvous_host, order.rendezvous_port, timeout_s=deadline.remaining_s)
    try:
        groups = join_groups(order, seat, rendezvous, timeout_s=deadline.remaining_s)
    finally:
        rendezvous.close()
    try:
        return build_rank(
            order.setup,
            groups,
            ranks_on_host=seat.ranks_on_host,
            progress=progress,
            meet=meet,
            kv_seat=KvSeat(address=seat.kv_address or seat.address, secret=secret_from(os.environ)),
        )
    except BaseException:
        groups.close()
        raise


def _hear_orders(order: RankOrder, identity: Identity, kv: RankKv, start: _Start, deadline: Deadline) -> RankControl:
    try:
        return RankControl(order.kv_bus, identity, kv, timeout_s=deadline.remaining_s, clock=monotonic_clock)
    except CommError as error:
        start.refuse(error)
        raise


class _Start:
    """The driver's questions before there are steps, each asked once all ranks have answered the one before."""

    def __init__(self, endpoint: StepEndpoint, deadline: Deadline) -> None:
        self._endpoint = endpoint
        self._deadline = deadline
        self._seq = 0

    def hear(self) -> None:
        """Wait for the next question. Raises: CommError"""
        try:
            self._seq, _ = self._endpoint.next_step(self._deadline.remaining_s)
        except CommTimeout as error:
            raise CommTimeout(f"not all ranks were as far within {self._deadline.timeout_s:g} s: {error}") from error

    def answer(self) -> None:
        """Say yes. Raises: CommError"""
        self._endpoint.send_result(self._seq, b"")

    def meet(self) -> None:
        """Say yes, and wait until all have. Raises: CommError"""
        self.answer()
        self.hear()

    def refuse(self, error: Exception) -> None:
        """Say why it cannot be, if the driver is there to hear it."""
        with suppress(CommError):
            self._endpoint.send_failure(self._seq, f"{type(error).__name__}: {error}")


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

    def run(self) -> bool:
        """Carry out steps until the bus is closed; return whether none has failed."""
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
            return not self._failed
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
