"""The replicas of a cluster behind a gateway: those of the newest view, each with a session of its own.

Owns who is kept, and what the router is told of them. A request keeps its replicas; one that has left the view takes
nothing new and ends what runs. While nobody publishes views, the last one holds. Nothing here is done for a token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import replace

import numpy as np

from ...placement.plan import Role
from ...sdk.errors import EngineUnavailable
from ..clock import Clock
from ..prompts import Seeds
from ..reconcile.views import ReplicaView, View
from ..rpc.backoff import Jitter
from ..rpc.engine_client import EngineLoadReport, HandOffReport
from ..rpc.view_source import ViewSource
from .loads import total_load
from .replica import Arrivals, ServedModel
from .replica_keeper import MakeClient, ReadModel, ReplicaKeeper, ReplicaState
from .router import Router
from .routes import Ask, ReplicaFacts, Route, RouterSettings, Split, Whole

logger = logging.getLogger(__name__)

SPLIT_FROM_TOKENS = RouterSettings().whole_below_tokens

_LINGER_S = 5.0

_ANYTHING = Ask(prompt=np.zeros(1, dtype=np.int32), max_tokens=1, may_split=False)
"""What is asked to learn who would get the next request."""

_Key = tuple[str, str]
"""A replica's name and its address: a name is never given again, so only a mistake gives it another address."""


class ReplicaSet:
    """The ``Replicas`` of a cluster, as views say who they are.

    ``make_client`` makes a client for an address, ``read_model`` reads the text side of a model and its generation.
    ``seed``: where requests without one get theirs from. ``on_ready`` is called for each incarnation that is met.
    ``split_from_tokens``: shorter prompts, and those with less that is not cached, are not split. ``salt``: makes
    gateways draw differently among many replicas.
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
        split_from_tokens: int = SPLIT_FROM_TOKENS,
        salt: int = 0,
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
        self._named: dict[str, ReplicaKeeper] = {}
        self._kinds: dict[tuple[object, ...], int] = {}
        self._router = Router(RouterSettings(whole_below_tokens=split_from_tokens), salt=salt)
        self._arrivals = Arrivals()
        self._reported: dict[str, EngineLoadReport] = {}
        self._view = View()
        self._stopped = False

    # ------------------------------------------------------------------ what requests see

    @property
    def attached(self) -> bool:
        """Whether a replica is there that takes whole requests."""
        return any(keeper.takes_requests and _decodes(keeper) for keeper in self._keepers.values())

    def current(self) -> ServedModel:
        """Return a replica that takes requests now. Raises: EngineUnavailable (retryable) without one"""
        able = [keeper for keeper in self._keepers.values() if keeper.takes_requests and _decodes(keeper)]
        models = [keeper.model for keeper in able if keeper.model is not None]
        if not models:
            raise EngineUnavailable(self._nobody())
        if len({model.kind for model in models}) > 1:
            # While models change, requests are made for either as replicas of either have room.
            route = self._route(_ANYTHING)
            if route is not None:
                self._router.ended(route)
                return self.reach(_decoder_of(route))
        return models[0]

    def route(self, ask: Ask, model: ServedModel) -> Route | None:
        """Return where a request goes that was made for this model, None while nobody can have it."""
        return self._route(replace(ask, generation=self._kind(model)))

    def reach(self, name: str) -> ServedModel:
        """Return a replica of a route. Raises: EngineUnavailable (retryable) when it is gone"""
        keeper = self._named.get(name)
        if keeper is None or keeper.model is None:
            raise EngineUnavailable(f"the replica {name} is gone")
        return keeper.model

    def where(self, name: str) -> tuple[str, str]:
        """Return a replica's own name and its address."""
        keeper = self._named.get(name)
        return ("", "") if keeper is None else (keeper.replica.replica, keeper.replica.address)

    def note_hand_off(self, route: Split, report: HandOffReport | None) -> None:
        """Learn from how a hand-off ended; None: nothing was heard of it."""
        self._router.note_hand_off(route, report, self._clock())

    def ended(self, route: Route) -> None:
        """Note that a request is over at its replicas."""
        self._router.ended(route)

    async def wait_changed(self) -> None:
        """Wait until a replica is met that was not there."""
        await self._arrivals.wait()

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

    @property
    def open_breakers(self) -> int:
        """Pairs of replicas that no request is split over now, because that failed."""
        return len(self._router.open_breakers)

    @property
    def splits(self) -> bool:
        """Whether the view has replicas, or wants some, that only compute prompts for others."""
        view = self._view
        return any(pool.wanted and pool.role is Role.PREFILL for pool in view.pools) or any(
            each.role is Role.PREFILL for each in view.replicas
        )

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
        wanted = {(replica.replica, replica.address): replica for replica in view.replicas}
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
            on_change=self._note_change,
        )

    async def _keep(self, key: _Key, keeper: ReplicaKeeper) -> None:
        await keeper.run()
        del self._keepers[key]
        self._reported.pop(keeper.name, None)
        logger.info("replica %s has left", keeper.name)

    # ------------------------------------------------------------------ choosing

    def _note_change(self, keeper: ReplicaKeeper) -> None:
        """Tell the router of a session that has begun or ended."""
        name, model = keeper.name, keeper.model
        if model is None:
            self._router.leave(name)
            self._named.pop(name, None)
            return
        self._named[name] = keeper
        facts = replace(model.facts, role=keeper.replica.role.value)
        self._router.join(name, ReplicaFacts.of(facts, generation=self._kind(model)))
        self._reported.pop(name, None)
        model.client.watch_blocks(lambda changes: self._router.note_blocks(name, changes))
        self._arrivals.tell()

    def _route(self, ask: Ask) -> Route | None:
        now_s = self._clock()
        away = {keeper.name for keeper in self._keepers.values() if not keeper.takes_requests}
        for keeper in self._named.values():
            self._take_report(keeper, now_s)
        route = self._router.route(replace(ask, exclude=ask.exclude | away) if away else ask, now_s)
        return self._anybody(ask) if route is None and not ask.decode and not ask.must_split else route

    def _anybody(self, ask: Ask) -> Route | None:
        """Return a replica that the router would spare, for it to say itself that it is full, or what cannot be."""
        able = [
            keeper
            for keeper in self._named.values()
            if keeper.takes_requests
            and _decodes(keeper)
            and keeper.name not in ask.exclude
            and keeper.model is not None
            and ask.generation in (None, self._kind(keeper.model))
        ]
        return Whole(replica=min(able, key=self._busyness).name) if able else None

    def _busyness(self, keeper: ReplicaKeeper) -> int:
        load = self._reported.get(keeper.name)
        return 0 if load is None else load.running + load.waiting

    def _take_report(self, keeper: ReplicaKeeper, now_s: float) -> None:
        """Tell the router of a report that has come since the last choice: reports come with every step."""
        load = None if keeper.model is None else keeper.model.client.load()
        if load is not None and load is not self._reported.get(keeper.name):
            self._reported[keeper.name] = load
            self._router.note_load(keeper.name, load, now_s)

    def _kind(self, model: ServedModel) -> int:
        """Return the number of those that answer alike: what the router knows as a generation."""
        return self._kinds.setdefault(model.kind, len(self._kinds))

    def _models(self) -> list[ServedModel]:
        return [keeper.model for keeper in self._keepers.values() if keeper.model is not None]

    def _nobody(self) -> str:
        """Say why nobody takes requests, in words that a client may hear."""
        if not self._view.epoch:
            return "no replica serves: the controller has not been heard yet"
        states = ", ".join(f"{count} {state}" for state, count in self.states().items() if count)
        return f"no replica serves now: view {self._view.epoch} has {states or 'none'}"


def _decodes(keeper: ReplicaKeeper) -> bool:
    return keeper.replica.role is not Role.PREFILL


def _decoder_of(route: Route) -> str:
    return route.decode if isinstance(route, Split) else route.replica
