"""The other ranks of a replica, reached over the step bus; a ``Peers`` but for whose processes they are.

Owns the bus, the groups and the deadline by which everybody has to be there, and says which rank it was when one is
missing or lost. A rank that ends takes the replica with it: whoever supervises the driver starts all of them anew.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TypeVar

from ...comm.errors import CommError, CommTimeout, PeerLost, RankFailed
from ...comm.groups import MeshGroups
from ...comm.handshake import Identity
from ...comm.step_bus import StepHub
from ...comm.step_listener import StepListener
from ...comm.torch_groups import Rendezvous
from ...comm.wire import BusLimits, Deadline
from ...sdk.errors import EngineError
from ..clock import monotonic_clock
from ..handoff.rank_hub import KvHub
from ..handoff.rank_kv import RankKv
from ..handoff.ranks import BusKvRanks, KvRanks
from ..messages import StepPlan, StepResult
from .rank import RankSetup
from .rank_life import join_groups
from .rank_order import RankOrder, Seat
from .step_codec import PlanEncoder, decode_result

START_TIMEOUT_S = 600.0
COMM_TIMEOUT_S = 60.0
_CHECK_PERIOD_S = 0.2
_REASON_TIMEOUT_S = 2.0
_END_TIMEOUT_S = 0.3

_T = TypeVar("_T")


class BusPeers(ABC):
    """Ranks 1 and up, as rank 0 sees them.

    ``seat``: the driver's own. ``bus``: where the step bus listens, ``kv_bus``: where the ranks hear about KV.
    Units: start_timeout_s, until all ranks are ready; comm_timeout_s, that a rank waits for another in a step
    Raises: EngineError naming the rank that did not come
    """

    def __init__(
        self,
        setup: RankSetup,
        identity: Identity,
        seat: Seat,
        *,
        bus: str,
        kv_bus: str,
        start_timeout_s: float,
        comm_timeout_s: float,
    ) -> None:
        self._deadline = Deadline(start_timeout_s, monotonic_clock)
        # A rank that is behind the driver's waits for others, at each stage as long as one exchange may take.
        self._patience_s = comm_timeout_s * (setup.pp + 1)
        self._encoder = PlanEncoder(max_slots=setup.max_slots)
        self._on_their_way: deque[int] = deque()
        self._speakers = setup.mesh.place(0).pp_ranks[1:]
        self._hub: StepHub | None = None
        self._kv_hub: KvHub | None = None
        # What was asked last before there are steps, whether all have answered it, and whether that was the end of it.
        self._asked = 0
        self._answered = False
        self._ready = False
        self._opened = contextlib.ExitStack()
        try:
            with StepListener(bus) as listener:
                rendezvous = Rendezvous.host(seat.address, timeout_s=start_timeout_s)
                self._opened.callback(rendezvous.close)
                if setup.kv is not None:
                    ranks = range(1, setup.mesh.size)
                    self._kv_hub = KvHub(kv_bus, identity, ranks=ranks, clock=monotonic_clock)
                    self._opened.callback(self._kv_hub.close)
                order = RankOrder(
                    replica=identity.replica,
                    bus=listener.address,
                    rendezvous_host=seat.address,
                    rendezvous_port=rendezvous.port,
                    timeout_s=start_timeout_s,
                    comm_timeout_s=comm_timeout_s,
                    setup=setup,
                    kv_bus="" if self._kv_hub is None else self._kv_hub.address,
                )
                self._call(order)
                self._hub = self._gather(listener, identity, setup)
            self._ask()
            self.groups: MeshGroups = self._while_they_live(
                lambda: join_groups(order, seat, rendezvous, timeout_s=self._deadline.remaining_s)
            )
            self._opened.callback(self.groups.close)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ whose processes they are

    @abstractmethod
    def _call(self, order: RankOrder) -> None:
        """Have the other ranks come."""

    @abstractmethod
    def _ended(self, *, wait_s: float = 0.0) -> str | None:
        """Return which rank's process has ended, if that can be seen; each is waited for."""

    @abstractmethod
    def _end(self, *, at_once: bool) -> None:
        """End the processes, if they are ours. Idempotent."""

    # ------------------------------------------------------------------ Peers

    def meet(self) -> None:
        """Wait until every rank has loaded its part."""
        self._wait_answers("has not loaded its part")
        self._ask()

    def wait_ready(self) -> None:
        """Wait until every rank takes steps."""
        self._wait_answers("is not ready")
        self._ready = True

    def kv_ranks(self, own: RankKv) -> KvRanks:
        """Return the KV of all ranks."""
        assert self._kv_hub is not None, "the setup says that KV is moved"
        # They said so before they said that they take steps.
        return BusKvRanks(own, self._kv_hub, timeout_s=self._patience_s)

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

    def check(self) -> None:
        """Look whether a rank was lost while nothing runs."""
        assert self._hub is not None, "wait_ready comes first"
        try:
            self._hub.check()
        except CommError as error:
            raise self._failed(error) from error

    def why(self) -> str | None:
        """Return what the other ranks say of a failure."""
        oldest = self._oldest_unanswered()
        if self._hub is None or oldest is None:
            return None
        try:
            self._hub.result(oldest, _REASON_TIMEOUT_S)
        except CommTimeout as late:
            return self._ended() or (str(late) if self._ready else self._late("is not ready"))
        except CommError as error:
            return str(self._failed(error))
        return None

    def close(self) -> None:
        """End the bus, the groups and the processes."""
        if self._hub is not None:
            self._hub.close()
        self._opened.close()
        self._end(at_once=not self._ready)

    # ------------------------------------------------------------------ waits

    def _gather(self, listener: StepListener, identity: Identity, setup: RankSetup) -> StepHub:
        # As many steps as there are stages are on their way, and one that is being sent.
        limits = BusLimits(max_ahead=max(BusLimits().max_ahead, setup.pp + 2))
        try:
            return listener.gather(
                identity,
                ranks=range(1, setup.mesh.size),
                timeout_s=self._deadline.timeout_s,
                clock=monotonic_clock,
                limits=limits,
                meanwhile=self._check_processes,
            )
        except CommError as error:
            raise self._failed(error) from error

    def _while_they_live(self, wait: Callable[[], _T]) -> _T:
        """Wait with the ranks, and give up as soon as one has ended.

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
            except FutureTimeoutError:
                self._all_answered(0.0)
                self._check_processes()
            except CommError as error:
                raise EngineError(self.why() or str(error)) from error

    def _ask(self) -> None:
        """Ask every rank whether it is as far; see ``rank_life``."""
        assert self._hub is not None, "the bus is there before it asks"
        try:
            self._asked = self._hub.send_step(b"")
        except CommError as error:
            raise self._failed(error) from error
        self._answered = False

    def _wait_answers(self, missing: str) -> None:
        while not self._all_answered(min(_CHECK_PERIOD_S, self._deadline.remaining_s)):
            self._check_processes()
            if not self._deadline.remaining_s:
                raise EngineError(f"{self._late(missing)} after {self._deadline.timeout_s:g} s")

    def _all_answered(self, wait_s: float) -> bool:
        """Wait until every rank has said that it is as far; return whether they have.

        Raises: EngineError when one says that it cannot be, or is lost
        """
        assert self._hub is not None, "the bus is there before it asks"
        if not self._answered:
            try:
                self._hub.result(self._asked, wait_s)
            except CommTimeout:
                return False
            except CommError as error:
                raise self._failed(error) from error
            self._answered = True
        return True

    def _oldest_unanswered(self) -> int | None:
        """Return the number of the oldest step, or of the question, that not all ranks have answered."""
        if self._ready:
            return self._on_their_way[0] if self._on_their_way else None
        return None if self._answered else self._asked

    def _late(self, missing: str) -> str:
        assert self._hub is not None, "the bus is there before it asks"
        return f"rank {', '.join(str(rank) for rank in self._hub.waits_for(self._asked))} {missing}"

    def _check_processes(self) -> None:
        if (ended := self._ended()) is not None:
            raise EngineError(f"{ended} before the replica was ready; its last lines say why")

    def _failed(self, error: CommError) -> EngineError:
        # A socket ends a moment before its process has.
        ended = self._ended(wait_s=_END_TIMEOUT_S if isinstance(error, PeerLost) else 0.0)
        text = str(error)
        if isinstance(error, RankFailed) and error.seq == self._asked:
            text = f"rank {error.rank} could not get ready: {error.text}"
        return EngineError(f"{text}; {ended}" if ended else text)
