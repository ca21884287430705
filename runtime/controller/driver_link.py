"""What the controller knows of a driver: met over its own protocol, proven by a token, asked for its load, drained.

Runs on a thread with an event loop of its own, next to the driver. Nothing here is on a request's way.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from ...sdk.errors import SlipstreamError
from ...sdk.params import SamplingParams
from ..messages import EngineRequest
from ..rpc.client import GrpcEngineClient
from ..rpc.engine_client import EngineFacts
from ..rpc.tls import Tls

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 10.0
_PROBE_TIMEOUT_S = 120.0
_PAUSE_S = 0.5
_DRAIN_TIMEOUT_S = 24 * 3600.0
_CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverReport:
    """What is known of a driver. ``proven``: a token came out of it. ``problem``: what stands in the way.

    ``requests``: also those that wait for KV of others; ``grants``, ``transfers``: KV on its way in, and out.
    """

    answers: bool = False
    proven: bool = False
    admitting: bool = True
    requests: int = 0
    grants: int = 0
    transfers: int = 0
    problem: str = ""


class DriverLink:
    """A session with one driver, kept until it is lost or left.

    ``secret``: what the two have to share over TCP; ``tls``: this side's certificates there.
    """

    def __init__(self, address: str, *, secret: bytes | None = None, tls: Tls | None = None) -> None:
        self._address = address
        self._secret = secret
        self._tls = tls
        self._proven = False
        self._drain_asked = False
        self._problem = ""
        self._client: GrpcEngineClient | None = None
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="slipstream-driver-link", daemon=True)
        self._thread.start()

    def report(self) -> DriverReport:
        """Return what is known now; any thread."""
        client = self._client
        load = client.load() if client is not None else None
        if load is None:
            return DriverReport(proven=self._proven, problem=self._problem)
        return DriverReport(
            answers=True,
            proven=self._proven,
            admitting=not load.draining,
            requests=load.running + load.waiting + load.awaiting,
            grants=load.receiving,
            transfers=load.sending,
            problem=self._problem,
        )

    def drain(self) -> None:
        """Let the driver take no more requests; any thread. Idempotent."""
        if not self._drain_asked:
            self._drain_asked = True
            asyncio.run_coroutine_threadsafe(self._drain(), self._loop)

    def close(self) -> None:
        """Leave the driver. Idempotent."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(_CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._keep())
        finally:
            self._loop.close()

    async def _keep(self) -> None:
        """Meet the driver, again when the session is lost, and let it prove itself once."""
        while not self._stopping.is_set():
            client = GrpcEngineClient(self._address, secret=self._secret, tls=self._tls)
            try:
                facts = await client.connect(timeout_s=_CONNECT_TIMEOUT_S)
                self._client = client
                if not self._proven:
                    await self._prove(client, facts)
                await self._lost_or_stopped(client)
            except (SlipstreamError, TimeoutError) as error:
                self._note(str(error) or type(error).__name__)
            finally:
                self._client = None
                await client.close()
            await self._stopped_within(_PAUSE_S)

    async def _prove(self, client: GrpcEngineClient, facts: EngineFacts) -> None:
        """Generate one token. Raises: SlipstreamError"""
        request = EngineRequest(
            request_id=f"ready-{secrets.token_hex(8)}",
            prompt_token_ids=np.array(facts.eos_token_ids[:1] or (0,), np.int32),
            params=SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False),
            seed=0,
            stop_ids=(),
            max_tokens=1,
            arrival_time_s=0.0,
            priority=-1,
        )
        events = client.generate(request, timeout_s=_PROBE_TIMEOUT_S)
        async with asyncio.timeout(_PROBE_TIMEOUT_S), aclosing(events):
            async for event in events:
                self._proven = self._proven or any(sample.token_ids for sample in event.samples)
        self._note("" if self._proven else "the engine ended a request without a token")

    async def _drain(self) -> None:
        client = self._client
        try:
            if client is not None:
                await client.drain(timeout_s=_DRAIN_TIMEOUT_S)
        except SlipstreamError as error:
            self._note(str(error))
        finally:
            # A driver that was lost meanwhile is asked again when the core asks again.
            self._drain_asked = False

    def _note(self, problem: str) -> None:
        """Keep what stands in the way, and say it once: nobody else tells the person who has to act."""
        if problem and problem != self._problem:
            logger.warning("driver at %s: %s", self._address, problem)
        self._problem = problem

    async def _lost_or_stopped(self, client: GrpcEngineClient) -> None:
        waits = [asyncio.ensure_future(client.wait_lost()), asyncio.ensure_future(self._stopping.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _stopped_within(self, pause_s: float) -> None:
        try:
            async with asyncio.timeout(pause_s):
                await self._stopping.wait()
        except TimeoutError:
            return
