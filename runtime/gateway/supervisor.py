"""Keeps a driver running behind a gateway: starts it, meets it, notices its end, starts another.

Owns when to try again. Requests in flight when a driver is lost wait by themselves for the next one, and go on there;
the gateway answers new ones with 503 until it has been met.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from ...sdk.errors import SlipstreamError
from ..clock import Clock
from ..rpc.backoff import Backoff
from ..rpc.engine_client import EngineFacts
from .replica import WatchedClient

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_STABLE_AFTER_S = 60.0
_CONNECT_TIMEOUT_S = 10.0


class Driver(Protocol):
    """A driver process, as its supervisor sees it."""

    address: str

    async def wait(self) -> int:
        """Wait until it has ended and return its status."""
        ...

    async def stop(self, *, timeout_s: float) -> None:
        """Ask it to end, and end it when it has not done so in time."""
        ...

    async def kill(self) -> None:
        """End it at once."""
        ...


class Place(Protocol):
    """Where a driver that has been met serves."""

    def attach(self, client: WatchedClient, facts: EngineFacts) -> None:
        """Serve with an engine that has been met."""
        ...

    def detach(self) -> None:
        """Stop serving: the engine is lost. Idempotent."""
        ...


class Supervisor:
    """Runs one driver at a time and attaches it to its place.

    ``launch`` starts a driver and returns when it takes requests; ``make_client`` makes a client for an address.
    ``on_ready`` is called each time that a driver has been attached.
    """

    def __init__(
        self,
        place: Place,
        *,
        launch: Callable[[], Awaitable[Driver]],
        make_client: Callable[[str], WatchedClient],
        clock: Clock,
        on_ready: Callable[[], None],
    ) -> None:
        self._place = place
        self._launch = launch
        self._make_client = make_client
        self._clock = clock
        self._on_ready = on_ready
        self._driver: Driver | None = None
        self._client: WatchedClient | None = None
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Keep a driver running until ``stop`` is called.

        Raises: what the first start raised: an engine that has never run is a mistake, not a failure
        """
        await self._start()
        backoff = Backoff(first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S, stable_after_s=_STABLE_AFTER_S)
        started_s = self._clock()
        while not self._stopping.is_set():
            if self._driver is not None and self._client is not None:
                await self._until_lost(self._driver, self._client)
                await self._let_go()
            if self._stopping.is_set():
                return
            pause_s = backoff.pause_s(lasted_s=self._clock() - started_s)
            logger.warning("the driver starts again in %g s", pause_s)
            if await self._stopped_within(pause_s):
                return
            started_s = self._clock()
            try:
                await self._start()
            except SlipstreamError as error:
                logger.error("the driver did not start: %s", error)

    async def stop(self, *, timeout_s: float) -> None:
        """End the driver, which may finish what runs within ``timeout_s``; what is cut then ends with an error."""
        self._stopping.set()
        driver, self._driver = self._driver, None
        if self._client is not None:
            await self._client.close()
        self._place.detach()
        if driver is not None:
            await driver.stop(timeout_s=timeout_s)

    async def _start(self) -> None:
        driver = await self._launch()
        client = self._make_client(driver.address)
        try:
            facts = await client.connect(timeout_s=_CONNECT_TIMEOUT_S)
        except BaseException:
            await client.close()
            await driver.kill()
            raise
        self._driver, self._client = driver, client
        self._place.attach(client, facts)
        logger.info("the engine is there: %s on %s, %s", facts.model, facts.device, facts.dtype)
        self._on_ready()

    async def _until_lost(self, driver: Driver, client: WatchedClient) -> None:
        """Return when the process has ended, or when it runs and can no longer be spoken to."""
        ended = asyncio.ensure_future(driver.wait())
        lost = asyncio.ensure_future(client.wait_lost())
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((ended, lost, stopping), return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                logger.error("the driver ended with status %d", ended.result())
            elif lost.done() and not self._stopping.is_set():
                logger.error("the connection to the driver was lost: %s", lost.result())
        finally:
            for task in (ended, lost, stopping):
                task.cancel()

    async def _let_go(self) -> None:
        if self._stopping.is_set():
            return
        self._place.detach()
        client, self._client = self._client, None
        driver, self._driver = self._driver, None
        if client is not None:
            await client.close()
        if driver is not None:
            await driver.kill()

    async def _stopped_within(self, pause_s: float) -> bool:
        try:
            async with asyncio.timeout(pause_s):
                await self._stopping.wait()
        except TimeoutError:
            return False
        return True
