"""Driver processes that move KV: started, met over gRPC, asked to split requests between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from slipstream.runtime.rpc.client import GrpcEngineClient
from slipstream.runtime.rpc.engine_client import SendTo
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
    """A driver process that is ready; ``client`` is a new client of it for each event loop."""

    name: str
    process: subprocess.Popen[str]
    address: str

    def send_to(self, ticket: str) -> SendTo:
        """Return where a request waits under a ticket."""
        return SendTo(replica=self.name, address=self.address, ticket=ticket)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[GrpcEngineClient]:
        """Meet the driver."""
        client = GrpcEngineClient(self.address)
        await client.connect(timeout_s=PATIENCE_S)
        try:
            yield client
        finally:
            await client.close()

    def exit_status(self) -> int:
        """Wait until the process has ended."""
        return self.process.wait(PATIENCE_S)


@contextmanager
def drivers(model: Path, *wanted: tuple[str, ...]) -> Iterator[list[Driver]]:
    """Start drivers, (name, role, transport, more options) of each, all at once; they are killed at the end."""
    with tempfile.TemporaryDirectory(prefix="slip") as folder, ExitStack() as stack:
        started = [(each[0], stack.enter_context(_process(model, folder, *each))) for each in wanted]
        yield [Driver(name, process, _address(process)) for name, process in started]


@contextmanager
def _process(
    model: Path, folder: str, name: str, role: str, transport: str, *options: str
) -> Iterator[subprocess.Popen[str]]:
    socket = str(Path(folder) / f"{name}.sock")
    arguments = [str(model), "--socket", socket, *SIZES, "--kv-transfer-timeout", "4", *options]
    arguments += ["--replica", name, "--role", role, "--kv-transport", transport]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "slipstream.runtime.worker.main", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "SLIPSTREAM_SECRET": SECRET},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def _address(process: subprocess.Popen[str]) -> str:
    """Wait until a driver is ready; one that ends before says so in its log."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "the driver ended before it was ready"
    return str(json.loads(line)["address"])
