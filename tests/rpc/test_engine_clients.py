"""The contract of ``EngineClient``, held against both implementations."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from slipstream.runtime.rpc.client import GrpcEngineClient
from slipstream.runtime.rpc.in_process import InProcessEngineClient
from slipstream.runtime.rpc.server import EngineServer
from slipstream.runtime.rpc.session import EngineHost
from slipstream.runtime.worker.driver import EngineLoop
from slipstream.sdk.errors import ConfigError, EngineUnavailable
from slipstream.tests.contracts.engine_client import PATIENCE_S, EngineClientContract, Served
from slipstream.tests.fakes.engine_bench import engine_bench


class TestInProcess(EngineClientContract):
    @asynccontextmanager
    async def serve(self, host: EngineHost) -> AsyncIterator[Served]:
        async def kill() -> None:
            assert isinstance(host, EngineLoop)
            host.close(timeout_s=0.0)

        yield Served(make_client=lambda: InProcessEngineClient(host), kill=kill)


class TestGrpc(EngineClientContract):
    @asynccontextmanager
    async def serve(self, host: EngineHost) -> AsyncIterator[Served]:
        # A short path: a socket's has at most 107 bytes.
        with tempfile.TemporaryDirectory(prefix="slip") as folder:
            server = EngineServer(host, str(Path(folder) / "engine.sock"))
            address = await server.start()

            async def kill() -> None:
                await server.stop(grace_s=0.0)

            try:
                yield Served(make_client=lambda: GrpcEngineClient(address), kill=kill)
            finally:
                await server.stop(grace_s=0.0)

    def test_nobody_there(self) -> None:
        async def test() -> None:
            client = GrpcEngineClient("/nowhere/engine.sock")
            with pytest.raises(EngineUnavailable, match="did not answer"):
                await client.connect(timeout_s=0.1)
            await client.close()

        self.run(test())

    def test_a_replica_that_is_still_starting_is_waited_for(self) -> None:
        async def test() -> None:
            with tempfile.TemporaryDirectory(prefix="slip") as folder, engine_bench() as bench:
                path = str(Path(folder) / "engine.sock")
                client = GrpcEngineClient(path)
                meeting = asyncio.create_task(client.connect(timeout_s=PATIENCE_S))
                await asyncio.wait([meeting], timeout=0)
                server = EngineServer(bench.loop, path)
                await server.start()
                assert await meeting == bench.loop.facts
                await client.close()
                await server.stop(grace_s=0.0)

        self.run(test())

    @pytest.mark.parametrize("address", ["localhost", "localhost:http", "host:99999", "/" + 120 * "x"])
    def test_a_wrong_address_is_refused(self, address: str) -> None:
        with pytest.raises(ConfigError, match="address"):
            GrpcEngineClient(address)
