"""Keeps one rank: its process, and for rank 0 the link to the driver in it. What an actor on the rank's node holds."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..driver_command import driver_environment
from ..reconcile.observed import DriverSeen, RankState
from ..rpc.secret import secret_from
from ..rpc.tls import tls_from
from .driver_link import DriverLink
from .launch import RankOrder
from .process_log import LogPage
from .rank_process import RankProcess


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperReport:
    """What a keeper says of its rank.

    ``meeting``: what other ranks are to be told; ``told``: whether this one was. ``loaded``: share of its weights.
    """

    state: RankState
    detail: str = ""
    pid: int = 0
    meeting: str = ""
    told: bool = False
    loaded: float = 0.0
    driver: DriverSeen | None = None


class RankKeeper:
    """Starts a rank, and ends it when asked. Its process notices when this one ends, whichever way."""

    def __init__(self, order: RankOrder) -> None:
        self._order = order
        self._process: RankProcess | None = None
        self._link: DriverLink | None = None
        self._failed = ""
        try:
            environment = driver_environment({**os.environ, **order.launch.environment})
            self._process = RankProcess(order.launch.module, order.arguments(), environment)
        except OSError as error:
            self._failed = f"its process could not be started: {error}"

    def report(self) -> KeeperReport:
        """Return how the rank is now."""
        process = self._process
        if process is None:
            return KeeperReport(state=RankState.FAILED, detail=self._failed)
        if (ended := process.ended()) is not None:
            return KeeperReport(state=RankState.FAILED, detail=ended, pid=process.pid)
        if not process.ready:
            return KeeperReport(
                state=RankState.LOADING,
                pid=process.pid,
                meeting=process.meeting,
                told=process.told,
                loaded=process.loaded,
            )
        return KeeperReport(
            state=RankState.READY,
            pid=process.pid,
            meeting=process.meeting,
            told=process.told,
            loaded=1.0,
            driver=self._driver(process),
        )

    def log(self, begin: int) -> LogPage:
        """Return what the rank has printed from a line on; see ``ProcessLog.page``."""
        return self._process.log.page(begin) if self._process is not None else LogPage(lines=(self._failed,), next=1)

    def meet(self, meeting: str) -> None:
        """Tell the rank where the ranks of its replica meet. Idempotent."""
        if self._process is not None:
            self._process.tell(meeting)

    def unroute(self) -> None:
        """Let the driver take no more requests."""
        if self._link is not None:
            self._link.drain()

    def end(self) -> None:
        """End the rank. Idempotent."""
        if self._link is not None:
            self._link.close()
        if self._process is not None:
            self._process.end()

    def _driver(self, process: RankProcess) -> DriverSeen | None:
        if self._order.rank or not process.address:
            return None
        if self._link is None:
            # The driver's own: in its launch, or in the environment that it has from this process.
            environment = {**os.environ, **self._order.launch.environment}
            self._link = DriverLink(process.address, secret=secret_from(environment), tls=tls_from(environment))
        known = self._link.report()
        if not known.answers:
            return None
        return DriverSeen(
            replica=self._order.spec.id,
            address=process.address,
            proven=known.proven,
            admitting=known.admitting,
            requests=known.requests,
            grants=known.grants,
            transfers=known.transfers,
        )
