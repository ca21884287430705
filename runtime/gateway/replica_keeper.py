"""One replica of a cluster, as a gateway keeps it: met, met again when it is lost, left when what runs on it has ended.

Owns when to try again and what is said about it. Whether the replica is in the view is told to it; which replica a
request goes to is decided elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from enum import StrEnum
from typing import Any, Protocol

from ...sdk.errors import CheckpointError, EngineUnavailable, SlipstreamError
from ..clock import Clock
from ..prompts import Seeds
from ..reconcile.views import ReplicaView
from ..rpc.backoff import Backoff, Jitter
from .replica import ModelText, ServedModel, WatchedClient, served_model

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 10.0
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0
_STABLE_AFTER_S = 10.0
_LOOK_S = 0.1


class ReplicaState(StrEnum):
    """How a gateway sees a replica."""

    CONNECTING = "connecting"  # in the view, not met yet
    ATTACHED = "attached"  # takes requests
    LEAVING = "leaving"  # no longer in the view; what runs on it goes on
    LOST = "lost"  # in the view, and cannot be reached; it is tried again
    SKIPPED = "skipped"  # in the view, but its model cannot be read here, or it does not let us in


class ReplicaClient(WatchedClient, Protocol):
    """A client of a replica that knows what runs on it."""

    @property
    def live_requests(self) -> int:
        """How many requests have not ended."""
        ...


MakeClient = Callable[[str], ReplicaClient]
ReadModel = Callable[[str, int], Awaitable[ModelText]]


class ReplicaKeeper:
    """Keeps a session with one replica, for as long as it is in the view and something runs on it.

    ``read_model`` returns the text side of a model and its generation; ``on_ready`` is called for each incarnation that
    is met, ``on_change`` when a session has begun or ended. Units: linger_s, how long after it left the view a request
    that was just given to it may still be sent
    """

    def __init__(
        self,
        replica: ReplicaView,
        *,
        make_client: MakeClient,
        read_model: ReadModel,
        seeds: Seeds,
        clock: Clock,
        jitter: Jitter,
        linger_s: float,
        on_ready: Callable[[], None],
        on_change: Callable[[ReplicaKeeper], None],
    ) -> None:
        self.name = f"{replica.replica} at {replica.address}"
        self.model: ServedModel | None = None
        self.replica = replica
        self._make_client = make_client
        self._read_model = read_model
        self._seeds = seeds
        self._clock = clock
        self._backoff = Backoff(
            first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S, stable_after_s=_STABLE_AFTER_S, jitter=jitter
        )
        self._linger_s = linger_s
        self._on_ready = on_ready
        self._on_change = on_change
        self._left = asyncio.Event()
        self._left_s = 0.0
        self._client: ReplicaClient | None = None
        self._failure = ReplicaState.CONNECTING
        self._problem = ""
        self._epoch = ""

    @property
    def state(self) -> ReplicaState:
        """How the replica is seen now."""
        if self._left.is_set():
            return ReplicaState.LEAVING
        return self._failure if self.model is None else ReplicaState.ATTACHED

    @property
    def takes_requests(self) -> bool:
        """Whether new requests may be sent to it."""
        if self.model is None or self._left.is_set():
            return False
        load = self.model.client.load()
        return load is None or not load.draining

    def leave(self) -> None:
        """Note that the replica is no longer in the view. Idempotent."""
        if not self._left.is_set():
            self._left_s = self._clock()
            self._left.set()

    def stay(self) -> None:
        """Note that the replica is in the view. Idempotent."""
        self._left.clear()

    async def close(self) -> None:
        """Leave the replica at once: what runs on it ends with an error."""
        self.leave()
        if self.model is not None:
            self.model = None
            self._on_change(self)
        if self._client is not None:
            await self._client.close()

    async def run(self) -> None:
        """Keep the session; return when the replica has left and nothing runs on it any more."""
        while not self._left.is_set():
            began_s = self._clock()
            try:
                if await self._unless_left(self._meet()):
                    await self._until_over()
            except (CheckpointError, OSError) as error:
                self._note(ReplicaState.SKIPPED, f"its model cannot be read by this gateway: {error}")
            except SlipstreamError as error:
                # A secret or an address that is wrong: somebody has to mend it, and then it is tried again.
                self._note(ReplicaState.LOST if error.retryable else ReplicaState.SKIPPED, str(error))
            except Exception:
                # A bug of ours with one replica is not to end those that serve.
                logger.exception("replica %s", self.name)
                self._note(ReplicaState.LOST, "this gateway failed at it")
            finally:
                await self._let_go()
            pause_s = self._backoff.pause_s(lasted_s=self._clock() - began_s)
            await self._unless_left(asyncio.sleep(pause_s))

    async def _meet(self) -> None:
        replica = self.replica
        client = self._client = self._make_client(replica.address)
        facts = await client.connect(timeout_s=_CONNECT_TIMEOUT_S)
        if facts.replica and facts.replica != replica.replica:
            raise EngineUnavailable(f"{facts.replica} answers at its address")
        generation = replica.generation.model
        text = await self._read_model(facts.model, generation)
        self.model = served_model(client, facts, text, seeds=self._seeds, generation=generation)
        self._note(ReplicaState.CONNECTING, "")
        logger.info("replica %s is there: %s on %s, %s", self.name, facts.model, facts.device, facts.dtype)
        self._on_change(self)
        if facts.epoch != self._epoch:
            self._epoch = facts.epoch
            self._on_ready()

    async def _until_over(self) -> None:
        """Wait until the session is lost, or the replica has left and nothing runs on it.

        Raises: EngineUnavailable when it was lost while it was in the view; one that has left may end
        """
        client = self._client
        assert client is not None, "only a replica that was met is waited for"
        lost = asyncio.ensure_future(client.wait_lost())
        try:
            while not lost.done():
                if not self._left.is_set():
                    left = asyncio.ensure_future(self._left.wait())
                    await asyncio.wait((lost, left), return_when=asyncio.FIRST_COMPLETED)
                    left.cancel()
                elif client.live_requests or self._clock() - self._left_s < self._linger_s:
                    await asyncio.wait((lost,), timeout=_LOOK_S)
                else:
                    return
            if not self._left.is_set():
                raise EngineUnavailable(str(lost.result()))
        finally:
            lost.cancel()

    async def _let_go(self) -> None:
        if self.model is not None:
            self.model = None
            self._on_change(self)
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def _unless_left(self, what: Coroutine[Any, Any, None]) -> bool:
        """Do something, or stop at it when the replica leaves; return whether it was done. Raises what it raises."""
        doing, left = asyncio.ensure_future(what), asyncio.ensure_future(self._left.wait())
        try:
            await asyncio.wait((doing, left), return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                doing.result()
            return doing.done()
        finally:
            doing.cancel()
            left.cancel()
            await asyncio.gather(doing, left, return_exceptions=True)

    def _note(self, state: ReplicaState, problem: str) -> None:
        """Keep what stands in the way, and say it once; ``state``: what the replica is in while it is not attached."""
        self._failure = state
        if problem and problem != self._problem:
            logger.warning("replica %s is %s: %s", self.name, state, problem)
        self._problem = problem
