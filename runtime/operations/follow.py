"""Looks at a deployment until it is as wanted, cannot become so, or the time is over.

Owns patience: a node may join a moment after its devices were missed, so that what is missing is said only when it
has been missing for a while.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from ..clock import Clock
from ..controller.cluster import ClusterError
from ..controller.ledger import Deployment
from ..controller.operator import Operator
from .progress import Event, Verdict, events, judge
from .reporter import Reporter
from .status import DeploymentStatus, look

SHORT_S = 10.0
"""For how long something has to be missing before it is."""

_PERIOD_S = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Time, as commands have it. ``pause``: waits so many seconds, or less when it is told to end."""

    clock: Clock
    pause: Callable[[float], None]
    period_s: float = _PERIOD_S


class Outcome(StrEnum):
    """How a command ended."""

    DONE = "done"
    SHORT = "short"
    FAILING = "failing"
    LATE = "late"  # the time was over


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """How it ended, and how the deployment was then."""

    outcome: Outcome
    status: DeploymentStatus


class Watcher:
    """Looks, and reports what has changed since the look before."""

    def __init__(self, operator: Operator, name: str, reporter: Reporter, patience: Patience) -> None:
        self._operator = operator
        self._name = name
        self._reporter = reporter
        self._patience = patience
        self._last: DeploymentStatus | None = None
        self._silent = ""

    def begin_here(self) -> None:
        """Take what is there now for known: only what comes of it is told. Raises: ClusterError"""
        self._last = look(self._operator, self._name)

    def look(self) -> DeploymentStatus | None:
        """Look once; None when the platform did not answer and never has."""
        try:
            status = look(self._operator, self._name)
        except ClusterError as error:
            if str(error) != self._silent:
                self._silent = str(error)
                self._reporter.events([Event(event="problem", text=self._silent)])
            return self._last
        self._silent = ""
        happened, self._last = events(self._last, status), status
        self._reporter.show(status, happened)
        return status

    def until(self, check: Callable[[DeploymentStatus], Outcome | None], *, timeout_s: float) -> Followed:
        """Look until there is an outcome. Raises: ClusterError when the platform never answered"""
        deadline_s = self._patience.clock() + timeout_s
        while True:
            status = self.look()
            outcome = check(status) if status is not None else None
            if outcome is None and self._patience.clock() >= deadline_s:
                outcome = Outcome.LATE
            if outcome is not None:
                if status is None:
                    raise ClusterError(self._silent)
                return Followed(outcome=outcome, status=status)
            self._patience.pause(self._patience.period_s)

    def until_as_wanted(self, wanted: Deployment, *, timeout_s: float) -> Followed:
        """Look until the deployment is as wanted, or has been short of something for a while."""
        short_since_s: float | None = None
        failed_before: dict[str, int] = {}

        def check(status: DeploymentStatus) -> Outcome | None:
            nonlocal short_since_s
            for pool in status.pools:
                # From the first look on; a pool that has lasted since begins anew.
                failed_before[pool.pool] = min(pool.failures, failed_before.get(pool.pool, pool.failures))
            verdict = judge(status, wanted, failed_before)
            now_s = self._patience.clock()
            if verdict is not Verdict.SHORT:
                short_since_s = None
            elif short_since_s is None:
                short_since_s = now_s
            match verdict:
                case Verdict.AS_WANTED:
                    return Outcome.DONE
                case Verdict.FAILING:
                    return Outcome.FAILING
                case Verdict.SHORT if short_since_s is not None and now_s - short_since_s >= SHORT_S:
                    return Outcome.SHORT
                case _:
                    return None

        return self.until(check, timeout_s=timeout_s)
