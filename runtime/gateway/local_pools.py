"""Prefill and decode replicas of one machine behind one gateway: each a driver of its own, kept running.

Stands where a cluster has its controller: starts the drivers, and publishes views of those that answer to the gateway's
own ``ReplicaSet``, in this process. A driver that is lost leaves the view; the one that takes its place is another
incarnation, with another name. Knows nothing of what requests do with them.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

from ...placement.plan import Degrees, Role
from ...sdk.errors import ConfigError, SlipstreamError
from ..clock import Clock
from ..config import EngineOptions, require_positive
from ..driver_command import KV_TRANSFER_DTYPES, KV_TRANSPORTS
from ..reconcile.desired import Generation
from ..reconcile.observed import ReplicaId
from ..reconcile.views import PoolView, ReplicaView, View
from ..rpc.engine_client import EngineFacts
from ..rpc.view_source import ViewBoard
from .process import Backend
from .replica import WatchedClient
from .replica_set import SPLIT_FROM_TOKENS
from .supervisor import Driver, Supervisor

MAX_REPLICAS = 64
"""Replicas of one machine; a driver takes as many sessions by default."""

LaunchReplica = Callable[[str, Role], Awaitable[Driver]]
"""Starts a driver as the replica of this name and role, and returns when it takes requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSplit:
    """How many replicas compute prompts, how many go on with them, and how keys and values get there.

    ``kv_transfer_dtype``: numbers on their way, "auto" as they are in the cache, or "fp8".
    ``split_from_tokens``: prompts of which fewer tokens are to be computed stay where they are decoded.
    Raises: ConfigError naming the option
    """

    prefill: int
    decode: int
    kv_transport: str = "auto"
    kv_transfer_dtype: str = "auto"
    split_from_tokens: int = SPLIT_FROM_TOKENS

    def __post_init__(self) -> None:
        for name, other in (("prefill", "decode"), ("decode", "prefill")):
            count = getattr(self, name)
            if count < 1:
                raise ConfigError(name, f"must be at least 1 beside --{other} {getattr(self, other)}, got {count}")
        if self.replicas > MAX_REPLICAS:
            raise ConfigError("prefill", f"with decode, {MAX_REPLICAS} replicas are the most, got {self.replicas}")
        require_positive("split_from_tokens", self.split_from_tokens)
        for name, words in (("kv_transport", KV_TRANSPORTS), ("kv_transfer_dtype", KV_TRANSFER_DTYPES)):
            if getattr(self, name) not in words:
                raise ConfigError(name, f"must be one of {', '.join(words)}, got {getattr(self, name)!r}")

    @property
    def replicas(self) -> int:
        """How many there are in all."""
        return self.prefill + self.decode

    @property
    def pools(self) -> tuple[PoolView, ...]:
        """The two pools."""
        return (
            PoolView(name=Role.PREFILL.value, role=Role.PREFILL, wanted=self.prefill),
            PoolView(name=Role.DECODE.value, role=Role.DECODE, wanted=self.decode),
        )


class LocalPools:
    """The ``Backend`` of a gateway that starts its replicas itself, several of them.

    ``replicas``: the gateway's own, which follows the views on ``board``; ``make_client`` makes a client that watches a
    driver, beside the one that requests use.
    """

    def __init__(
        self,
        pools: Sequence[PoolView],
        *,
        engine: EngineOptions,
        launch: LaunchReplica,
        make_client: Callable[[str], WatchedClient],
        board: ViewBoard,
        replicas: Backend,
        clock: Clock,
    ) -> None:
        self._pools = tuple(pools)
        self._board = board
        self._replicas = replicas
        degrees = degrees_of(engine)
        incarnations = itertools.count(1)
        self._seats = [
            _Seat(pool, degrees, incarnations, launch, self._publish)
            for pool in self._pools
            for _ in range(pool.wanted)
        ]
        self._supervisors = [
            Supervisor(seat, launch=seat.launch, make_client=make_client, clock=clock, on_ready=lambda: None)
            for seat in self._seats
        ]

    @property
    def whole(self) -> bool:
        """Whether every replica that is wanted is in the view."""
        return all(seat.view is not None for seat in self._seats)

    async def run(self) -> None:
        """Keep all drivers running until ``stop``.

        Raises: what a first start raised: an engine that has never run is a mistake, not a failure
        """
        failed: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                following = group.create_task(self._replicas.run(), name="replicas")
                running = [group.create_task(each.run(), name="driver") for each in self._supervisors]
                await asyncio.wait(running)
                following.cancel()
        except* SlipstreamError as several:
            failed = several.exceptions[0]
        if failed is not None:
            raise failed

    async def stop(self, *, timeout_s: float) -> None:
        """End all drivers, which may finish what runs within ``timeout_s``; what is cut then ends with an error."""
        await self._replicas.stop(timeout_s=timeout_s)
        await asyncio.gather(*(each.stop(timeout_s=timeout_s) for each in self._supervisors))

    def _publish(self) -> None:
        newest = self._board.newest
        replicas = tuple(seat.view for seat in self._seats if seat.view is not None)
        view = View(epoch=newest.epoch + 1, begun=True, pools=self._pools, replicas=replicas)
        if not view.says_the_same(newest):
            self._board.publish(view)


class _Seat:
    """The place of one replica: one incarnation after the other, in the view while it can be spoken to."""

    def __init__(
        self,
        pool: PoolView,
        degrees: Degrees,
        incarnations: Iterator[int],
        launch: LaunchReplica,
        changed: Callable[[], None],
    ) -> None:
        self.view: ReplicaView | None = None
        self._pool = pool
        self._degrees = degrees
        self._incarnations = incarnations
        self._launch = launch
        self._changed = changed
        self._coming: ReplicaView | None = None

    async def launch(self) -> Driver:
        """Start the next incarnation."""
        name = str(ReplicaId(pool=self._pool.name, incarnation=next(self._incarnations)))
        driver = await self._launch(name, self._pool.role)
        self._coming = ReplicaView(
            replica=name,
            pool=self._pool.name,
            role=self._pool.role,
            generation=Generation(),
            degrees=self._degrees,
            address=driver.address,
        )
        return driver

    def attach(self, client: WatchedClient, facts: EngineFacts) -> None:
        """Show it in the view: it has been met."""
        del client, facts
        self.view = self._coming
        self._changed()

    def detach(self) -> None:
        """Take it out of the view: it is lost."""
        self.view = None
        self._changed()


def degrees_of(engine: EngineOptions) -> Degrees:
    """Return how an engine's options cut a replica."""
    return Degrees(
        tp=engine.tensor_parallel_size,
        pp=engine.pipeline_parallel_size,
        ep=engine.expert_parallel_size,
        experts_over_tp=engine.enable_expert_parallel,
    )
