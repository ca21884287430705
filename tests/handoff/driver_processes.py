"""Driver processes that move KV: started, met over gRPC, asked to split requests between them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from slipstream.runtime.rpc.client import GrpcEngineClient
from slipstream.runtime.rpc.engine_client import EngineFacts, SendTo
from slipstream.tests.handoff.split_ways import PATIENCE_S

SECRET = "a secret of these tests"
SIZES = (
    "--dtype=float32",
    "--num-gpu-blocks-override=128",
    "--max-model-len=256",
    "--max-num-seqs=8",
    "--max-num-batched-tokens=64",
    "--num-threads=1",
    "--step-timeout-s=30",
)


@dataclass
class Driver:
    """A driver process, and a client of it."""

    name: str
    process: asyncio.subprocess.Process
    address: str
    client: GrpcEngineClient
    facts: EngineFacts

    def send_to(self, ticket: str) -> SendTo:
        """Return where a request waits under a ticket."""
        return SendTo(replica=self.name, address=self.address, ticket=ticket)


@asynccontextmanager
async def driver(
    model: Path, name: str, role: str, *options: str, transport: str = "tcp", socket: str | None = None
) -> AsyncIterator[Driver]:
    """Start a driver, and wait until it is ready; it is killed at the end."""
    with tempfile.TemporaryDirectory(prefix="slip") as folder:
        arguments = [str(model), "--socket", socket or str(Path(folder) / "engine.sock"), *SIZES, *options]
        arguments += ["--replica", name, "--role", role, "--kv-transport", transport, "--kv-transfer-timeout", "4"]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "slipstream.runtime.worker.main", *arguments),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "SLIPSTREAM_SECRET": SECRET},
        )
        try:
            assert process.stdout is not None
            line = await asyncio.wait_for(process.stdout.readline(), PATIENCE_S)
            assert line, "the driver ended before it was ready"
            address = json.loads(line)["address"]
            client = GrpcEngineClient(address)
            facts = await client.connect(timeout_s=PATIENCE_S)
            try:
                yield Driver(name, process, address, client, facts)
            finally:
                await client.close()
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


@asynccontextmanager
async def drivers(
    model: Path, *wanted: tuple[str, str, tuple[str, ...]], transport: str = "tcp"
) -> AsyncIterator[list[Driver]]:
    """Start several drivers at once: (name, role, options) of each."""
    async with AsyncExitStack() as stack:
        yield list(
            await asyncio.gather(
                *(
                    stack.enter_async_context(driver(model, name, role, *options, transport=transport))
                    for name, role, options in wanted
                )
            )
        )
