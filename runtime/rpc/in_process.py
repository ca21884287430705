"""An engine in this process, without a wire: the same contract and the same session, values handed over as they are."""

from __future__ import annotations

import asyncio

from ...sdk.errors import EngineUnavailable
from .engine_client import EngineFacts
from .session import Command, EngineHost, HostSession
from .session_client import DEFAULT_MAX_LIVE_REQUESTS, SessionClient


class InProcessEngineClient(SessionClient):
    """The ``EngineClient`` of an engine that runs on a thread of this process. The engine itself is its owner's."""

    def __init__(self, host: EngineHost, *, max_live_requests: int = DEFAULT_MAX_LIVE_REQUESTS) -> None:
        super().__init__(max_live_requests=max_live_requests)
        self._host = host
        self._session: HostSession | None = None
        self._task: asyncio.Task[None] | None = None

    async def _connect(self) -> EngineFacts:
        self._session = self._host.open_session()
        self._task = asyncio.create_task(self._receive(self._session), name="engine session")
        return self._host.facts

    def _send(self, command: Command) -> None:
        assert self._session is not None, "nothing is sent before connect"
        self._session.send(command)

    async def _disconnect(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        if self._session is not None:
            self._session.close()

    async def _receive(self, session: HostSession) -> None:
        failure = EngineUnavailable("the session was left")
        try:
            while events := await session.receive():
                for event in events:
                    self._take(event)
        except EngineUnavailable as error:
            failure = error
        finally:
            self._fail_all(failure)
            session.close()
