"""The contract of talk about KV, held against both ways to talk."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from slipstream.runtime.rpc.kv_client import GrpcKvTalker
from slipstream.runtime.rpc.kv_in_process import InProcessKvTalker
from slipstream.runtime.rpc.kv_talk import KvHost
from slipstream.runtime.rpc.server import EngineServer
from slipstream.tests.contracts.kv_talk import KvTalkContract, Talking
from slipstream.tests.fakes.scripted_host import ScriptedHost


class TestInProcess(KvTalkContract):
    async def talking(self) -> AsyncIterator[Talking]:
        talker = InProcessKvTalker()

        async def serve(host: KvHost) -> None:
            talker.serve("d", host)

        async def stop() -> None:
            talker.stop("d")

        yield Talking(talker=talker, address="d", serve=serve, stop=stop)
        talker.stop("d")


class TestGrpc(KvTalkContract):
    async def talking(self) -> AsyncIterator[Talking]:
        servers: list[EngineServer] = []
        with tempfile.TemporaryDirectory(prefix="slip") as folder:
            address = str(Path(folder) / "driver.sock")

            async def serve(host: KvHost) -> None:
                await stop()
                servers.append(EngineServer(ScriptedHost(None), address, kv=host))
                await servers[0].start()

            async def stop() -> None:
                if servers:
                    await servers.pop().stop(grace_s=0.0)

            talker = GrpcKvTalker(asyncio.get_running_loop(), first_pause_s=0.01, longest_pause_s=0.05)
            yield Talking(talker=talker, address=address, serve=serve, stop=stop)
            await stop()
