"""One driver process: started, waited for until it takes requests, ended.

Owns the command line and the one line by which a driver says that it is ready. Whether to start another is the
supervisor's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...sdk.errors import ConfigError, EngineUnavailable
from ..config import EngineOptions
from ..driver_command import DRIVER_MODULE, driver_environment, engine_arguments

logger = logging.getLogger(__name__)

EXIT_REFUSED = 2
"""A driver's exit status when its options or its checkpoint are wrong: another one would fail the same way."""

_KILL_TIMEOUT_S = 10.0


def driver_command(
    options: EngineOptions, socket: Path, *, drain_timeout_s: float, role: Sequence[str] = ()
) -> list[str]:
    """Return the command that starts a driver for a model; ``role``: arguments that say what part it has."""
    where = ("--socket", str(socket), "--drain-timeout", str(drain_timeout_s), *role)
    return [sys.executable, "-P", "-m", DRIVER_MODULE, *where, *engine_arguments(options), "--", options.model]


class DriverProcess:
    """A driver that runs, at ``address``."""

    def __init__(self, process: Process, address: str) -> None:
        self._process = process
        self.address = address
        self._output = asyncio.create_task(_forward(process), name="driver output")

    @classmethod
    async def start(
        cls, command: Sequence[str], *, timeout_s: float, environment: Mapping[str, str] | None = None
    ) -> DriverProcess:
        """Start a driver and wait until it takes requests. ``environment``: in addition to this process's.

        Raises: ConfigError when its options or checkpoint are wrong; EngineUnavailable (retryable) when it ended or
        was not ready in time
        """
        # A session of its own: Ctrl-C in a terminal is for the gateway, which lets the driver finish what runs.
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=PIPE,
            start_new_session=True,
            env=driver_environment({**os.environ, **(environment or {})}),
        )
        try:
            async with asyncio.timeout(timeout_s):
                address = await _ready_line(process)
        except TimeoutError as error:
            await _kill(process)
            raise EngineUnavailable(f"the driver was not ready within {timeout_s:g} s") from error
        except BaseException:
            await _kill(process)
            raise
        if address is None:
            status = await process.wait()
            if status == EXIT_REFUSED:
                raise ConfigError("model", "the engine refuses to start; its last lines say why")
            raise EngineUnavailable(f"the driver ended with status {status} before it was ready")
        return cls(process, address)

    async def wait(self) -> int:
        """Wait until the driver has ended and return its status."""
        return await self._process.wait()

    async def stop(self, *, timeout_s: float) -> None:
        """Ask the driver to finish what runs; end it when it has not done so in time."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._process.wait()
        await self.kill()

    async def kill(self) -> None:
        """End the driver at once."""
        await _kill(self._process)
        self._output.cancel()
        await asyncio.gather(self._output, return_exceptions=True)


async def _ready_line(process: Process) -> str | None:
    """Return the address that the driver is ready at, None when its output ended before."""
    assert process.stdout is not None
    while line := await process.stdout.readline():
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        match value:
            case {"ready": True, "address": str(address)}:
                return address
        logger.info("driver: %s", line.decode(errors="replace").rstrip())
    return None


async def _forward(process: Process) -> None:
    """Log what else a driver prints: a pipe that nobody reads would fill up and stop it."""
    assert process.stdout is not None
    with contextlib.suppress(ValueError):  # a line longer than the reader's limit
        while line := await process.stdout.readline():
            logger.info("driver: %s", line.decode(errors="replace").rstrip())


async def _kill(process: Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KILL_TIMEOUT_S):
                await process.wait()
