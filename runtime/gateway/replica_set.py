"""The replicas of a cluster behind a gateway: those of the newest view, each with a session of its own.

Owns who is kept and who gets a request. A request keeps its replica; one that has left the view takes nothing new and
ends what runs. While nobody publishes views, the last one holds. Nothing here is done for a token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import aclosing

from ...placement.plan import Role
from ...sdk.errors import EngineUnavailable
from ..clock import Clock
from ..prompts import Seeds
from ..reconcile.views import ReplicaView, View
from ..rpc.backoff import Jitter
from ..rpc.engine_client import EngineLoadReport
from ..rpc.view_source import ViewSource
from .choosing import Balance
from .loads import total_load
from .replica import ServedModel
from .replica_keeper import MakeClient, ReadModel, ReplicaKeeper, ReplicaState

logger = logging.getLogger(__name__)

_LINGER_S = 5.0

_Key = tuple[str, str]
"""A replica's name and its address: a name is never given again, so only a mistake gives it another address."""


class ReplicaSet:
    """The ``Replicas`` of a cluster, as views say who they are.

    ``make_client`` makes a client for an address, ``read_model`` reads the text side of a model and its generation.
    ``seed``: where requests without one get theirs from. ``on_ready`` is called for each incarnation that is met.
    """

    def __init__(
        self,
        source: ViewSource,
        *,
        make_client: MakeClient,
        read_model: ReadModel,
        clock: Clock,
        jitter: Jitter,
        seed: int | None = None,
        linger_s: float = _LINGER_S,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._source = source
        self._make_client = make_client
        self._read_model = read_model
        self._clock = clock
        self._jitter = jitter
        self._seeds = Seeds(seed)
        self._linger_s = linger_s
        self._on_ready = on_ready
        self._keepers: dict[_Key, ReplicaKeeper] = {}
        self._balance = Balance()
        self._reported: dict[str, EngineLoadReport] = {}
        self._view = View()
        self._stopped = False

    # ------------------------------------------------------------------ what requests see

    @property
    def attached(self) -> bool:
        """Whether a replica is there that takes requests."""
        return any(keeper.takes_requests for keeper in self._keepers.values())

    def current(self) -> ServedModel:
        """Return the replica that the next request would get. Raises: EngineUnavailable (retryable) without one"""
        model = self._model_of(self._least(list(self._keepers.values())))
        if model is None:
            raise EngineUnavailable(self._nobody())
        return model

    def take(self, *, sequences: int) -> ServedModel:
        """Return the replica for a request of about so many sequences: the least loaded, by turns where several are.

        Raises: EngineUnavailable (retryable) while there is none
        """
        model = self._take(list(self._keepers.values()), sequences)
        if model is None:
            raise EngineUnavailable(self._nobody())
        return model

    def other(self, model: ServedModel, *, sequences: int) -> ServedModel | None:
        """Return another replica to which a request that was made for one means the same, None without one."""
        others = [
            keeper
            for keeper in self._keepers.values()
            if keeper.model is not None and keeper.model is not model and keeper.model.answers_like(model)
        ]
        return self._take(others, sequences)

    def has(self, epoch: str) -> bool:
        """Return whether a replica of this incarnation is attached."""
        return any(model.facts.epoch == epoch for model in self._models())

    def load(self) -> EngineLoadReport | None:
        """Return the newest load of all replicas together, None without one."""
        loads = [model.client.load() for model in self._models()]
        return total_load([load for load in loads if load is not None])

    def states(self) -> Mapping[str, int]:
        """Return how many replicas are in each state."""
        counts = {state.value: 0 for state in ReplicaState}
        for keeper in self._keepers.values():
            counts[keeper.state] += 1
        return counts

    # ------------------------------------------------------------------ following views

    async def run(self) -> None:
        """Follow views until this is cancelled."""
        async with asyncio.TaskGroup() as group, aclosing(self._source.views()) as views:
            async for view in views:
                self._follow(view, group)

    async def stop(self, *, timeout_s: float) -> None:
        """Leave all replicas at once: what still runs ends with an error. They go on for others."""
        del timeout_s
        self._stopped = True
        await asyncio.gather(*(keeper.close() for keeper in self._keepers.values()))

    def _follow(self, view: View, group: asyncio.TaskGroup) -> None:
        if self._stopped:
            return
        self._view = view
        # A replica that only prefills has nobody to hand a request on to here.
        wanted = {
            (replica.replica, replica.address): replica for replica in view.replicas if replica.role is not Role.PREFILL
        }
        logger.info("view %d: %s", view.epoch, ", ".join(name for name, _ in wanted) or "nobody serves")
        for key, keeper in self._keepers.items():
            if key not in wanted:
                keeper.leave()
        for key, replica in wanted.items():
            if key in self._keepers:
                self._keepers[key].stay()
            else:
                self._keepers[key] = self._keeper(replica)
                group.create_task(self._keep(key, self._keepers[key]), name=f"replica {replica.replica}")

    def _keeper(self, replica: ReplicaView) -> ReplicaKeeper:
        return ReplicaKeeper(
            replica,
            make_client=self._make_client,
            read_model=self._read_model,
            seeds=self._seeds,
            clock=self._clock,
            jitter=self._jitter,
            linger_s=self._linger_s,
            on_ready=self._on_ready,
        )

    async def _keep(self, key: _Key, keeper: ReplicaKeeper) -> None:
        await keeper.run()
        del self._keepers[key]
        self._balance.forget(keeper.name)
        self._reported.pop(keeper.name, None)
        logger.info("replica %s has left", keeper.name)

    # ------------------------------------------------------------------ choosing

    def _take(self, keepers: list[ReplicaKeeper], sequences: int) -> ServedModel | None:
        keeper = self._least(keepers)
        if keeper is not None:
            self._balance.send(keeper.name, sequences)
        return self._model_of(keeper)

    def _least(self, keepers: list[ReplicaKeeper]) -> ReplicaKeeper | None:
        able = {keeper.name: keeper for keeper in keepers if keeper.takes_requests}
        for keeper in able.values():
            self._take_report(keeper)
        name = self._balance.least(able)
        return None if name is None else able[name]

    def _take_report(self, keeper: ReplicaKeeper) -> None:
        """Tell the balance of a report that has come since the last choice: reports come with every step."""
        load = None if keeper.model is None else keeper.model.client.load()
        if load is not None and load is not self._reported.get(keeper.name):
            self._reported[keeper.name] = load
            self._balance.report(keeper.name, load.running + load.waiting)

    def _models(self) -> list[ServedModel]:
        return [keeper.model for keeper in self._keepers.values() if keeper.model is not None]

    @staticmethod
    def _model_of(keeper: ReplicaKeeper | None) -> ServedModel | None:
        return None if keeper is None else keeper.model

    def _nobody(self) -> str:
        """Say why nobody takes requests, in words that a client may hear."""
        if not self._view.epoch:
            return "no replica serves: the controller has not been heard yet"
        states = ", ".join(f"{count} {state}" for state, count in self.states().items() if count)
        return f"no replica serves now: view {self._view.epoch} has {states or 'none'}"
