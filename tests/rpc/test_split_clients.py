"""What clients owe requests that begin at one replica and go on at another, held against both implementations."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from slipstream.runtime.rpc.client import GrpcEngineClient
from slipstream.runtime.rpc.in_process import InProcessEngineClient
from slipstream.runtime.rpc.server import EngineServer
from slipstream.runtime.rpc.session import EngineHost
from slipstream.tests.contracts.engine_client import Served
from slipstream.tests.contracts.split_client import SplitClientContract


async def never() -> None:
    raise AssertionError("nothing here is killed")


class TestInProcess(SplitClientContract):
    @asynccontextmanager
    async def serve(self, host: EngineHost) -> AsyncIterator[Served]:
        yield Served(make_client=lambda: InProcessEngineClient(host), kill=never)


class TestGrpc(SplitClientContract):
    @asynccontextmanager
    async def serve(self, host: EngineHost) -> AsyncIterator[Served]:
        with tempfile.TemporaryDirectory(prefix="slip") as folder:
            server = EngineServer(host, str(Path(folder) / "engine.sock"))
            address = await server.start()
            try:
                yield Served(make_client=lambda: GrpcEngineClient(address), kill=never)
            finally:
                await server.stop(grace_s=0.0)
