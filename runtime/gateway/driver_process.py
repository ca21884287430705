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
from dataclasses import fields
from pathlib import Path

from ...sdk.errors import ConfigError, EngineUnavailable
from ..config import EngineOptions

logger = logging.getLogger(__name__)

EXIT_REFUSED = 2
"""A driver's exit status when its options or its checkpoint are wrong: another one would fail the same way."""

_MODULE = "slipstream.runtime.worker.main"
_NOT_FOR_A_DRIVER = ("model", "skip_tokenizer_init")
_KILL_TIMEOUT_S = 10.0
_HUGE_PAGES = "glibc.malloc.hugetlb"


def driver_command(options: EngineOptions, socket: Path, *, drain_timeout_s: float) -> list[str]:
    """Return the command that starts a driver for a model."""
    command = [sys.executable, "-P", "-m", _MODULE, "--socket", str(socket), "--drain-timeout", str(drain_timeout_s)]
    for each in fields(EngineOptions):
        value = getattr(options, each.name)
        if each.name in _NOT_FOR_A_DRIVER or value == each.default:
            continue
        flag = each.name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command += [f"--{flag}", str(value)]
    return [*command, "--", options.model]


def driver_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return a driver's environment: huge pages for all that it allocates, unless somebody has chosen already.

    glibc reads this before the process begins, so only whoever starts it can set it. Weights on a CPU are read from
    beginning to end at every step, and are many small pieces: in small pages a step takes 5 to 15 % longer.
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    if _HUGE_PAGES not in tunables:
        tunables = ":".join(filter(None, (tunables, f"{_HUGE_PAGES}=1")))
    return {**environment, "GLIBC_TUNABLES": tunables}


class DriverProcess:
    """A driver that runs, at ``address``."""

    def __init__(self, process: Process, address: str) -> None:
        self._process = process
        self.address = address
        self._output = asyncio.create_task(_forward(process), name="driver output")

    @classmethod
    async def start(cls, command: Sequence[str], *, timeout_s: float) -> DriverProcess:
        """Start a driver and wait until it takes requests.

        Raises: ConfigError when its options or checkpoint are wrong; EngineUnavailable (retryable) when it ended or
        was not ready in time
        """
        # A session of its own: Ctrl-C in a terminal is for the gateway, which lets the driver finish what runs.
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=PIPE,
            start_new_session=True,
            env=driver_environment(os.environ),
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
