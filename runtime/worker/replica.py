"""A replica of several ranks, as its driver sees it: one executor, which the engine cannot tell from a single rank's.

Owns what a step is with other ranks: everybody gets the plan, everybody has to have carried it out, and one of them, on
the last stage, says what was drawn. How the others are reached is a ``Peers``' business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Protocol

from ...comm.errors import CommError
from ...comm.groups import MeshGroups
from ...sdk.errors import EngineError
from ..handoff.rank_kv import RankKv
from ..handoff.ranks import KvRanks
from ..messages import StepPlan, StepResult
from .executor import ModelExecutor
from .rank import RankSetup


class Peers(Protocol):
    """The ranks of a replica besides the driver's own, which is rank 0."""

    @property
    def groups(self) -> MeshGroups:
        """Rank 0's groups."""
        ...

    def meet(self) -> None:
        """Wait until every rank has loaded its part of the model, as the driver's own has.

        Raises: as ``wait_ready``
        """
        ...

    def wait_ready(self) -> None:
        """Wait until every rank takes steps.

        Raises: EngineError naming the rank that failed or did not get ready in time
        """
        ...

    def kv_ranks(self, own: RankKv) -> KvRanks:
        """Return the KV of all ranks, once all take steps; closing that closes the driver's own rank's.

        Raises: EngineError naming the rank that did not come
        """
        ...

    def send(self, plan: StepPlan) -> None:
        """Give a step to every rank. Raises: EngineError when one is lost, or too far behind."""
        ...

    def result(self, plan: StepPlan) -> Sequence[StepResult]:
        """Wait until every rank has carried out the oldest step, which the driver's own has; return what the first rank
        of each stage but the driver's says, in the stages' order.

        Raises: EngineError naming the rank that failed, or is behind by more than ranks wait for one another
        """
        ...

    def check(self) -> None:
        """Look, without waiting, whether a rank was lost while nothing runs. Raises: EngineError naming it"""
        ...

    def why(self) -> str | None:
        """Return what the other ranks say of a failure that the driver's own rank has seen; waits a moment at most."""
        ...

    def close(self) -> None:
        """End the ranks, and everything that was opened for them. Idempotent; waits seconds at most."""
        ...


StartPeers = Callable[[RankSetup], Peers]
"""Starts the other ranks of a replica, and returns once the groups with them are open. Raises: EngineError"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _ReplicaStep:
    """A step on its way on every rank."""

    plan: StepPlan
    own: Future[StepResult]
    peers: Peers

    def result(self, timeout: float | None = None) -> StepResult:
        """Wait for all ranks. Where one fails, the others only see that it is gone: it is asked why."""
        try:
            own = self.own.result(timeout)
        except CommError as error:
            raise EngineError(self.peers.why() or str(error)) from error
        # What was drawn is known at the last stage.
        results = (own, *self.peers.result(self.plan))
        return replace(results[-1], stages=tuple(time for result in results for time in result.stages))


class ReplicaExecutor:
    """Carries out steps on all ranks; an ``Executor``."""

    def __init__(self, own: ModelExecutor, peers: Peers) -> None:
        self._own = own
        self._peers = peers

    def submit(self, plan: StepPlan) -> _ReplicaStep:
        """Give the step to every rank; the own one comes last, because it begins at once."""
        self._peers.send(plan)
        return _ReplicaStep(plan=plan, own=self._own.submit(plan), peers=self._peers)

    def close(self) -> None:
        """End all ranks."""
        self._own.close()
        self._peers.close()
