"""The contract of ``ViewSource``, held against both implementations, the one over gRPC with a secret and without."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.rpc.backoff import no_jitter
from slipstream.runtime.rpc.view_server import ViewServer
from slipstream.runtime.rpc.view_source import InProcessViewWatch, ViewBoard
from slipstream.runtime.rpc.view_watch import ViewWatch
from slipstream.tests.contracts.view_source import MakeSource, ViewSourceContract, until


class TestInProcess(ViewSourceContract):
    @asynccontextmanager
    async def serve(self, board: ViewBoard) -> AsyncIterator[MakeSource]:
        yield lambda: InProcessViewWatch(board)


class TestGrpc(ViewSourceContract):
    secret: bytes | None = None

    @asynccontextmanager
    async def serve(self, board: ViewBoard) -> AsyncIterator[MakeSource]:
        server = ViewServer(board, "127.0.0.1:0", secret=self.secret, heartbeat_s=0.05)
        address = await server.start()
        try:
            yield lambda: ViewWatch([address], clock=monotonic_clock, jitter=no_jitter, secret=self.secret)
            await until(lambda: server.watchers == 0)
        finally:
            await server.stop()


class TestGrpcWithSecret(TestGrpc):
    secret = b"a secret of a test cluster"
