"""A deployment of one's own: ``slipstream up`` in a process beside this one, on a Ray that begins and ends with it.

Owns its command line, the wait until all serves, and its end. It has a state folder of its own, so that it neither
finds nor touches a Ray or a deployment that the user has. What it is asked is its callers' business: they get an
address and speak HTTP to it, as anybody does.

    SlipstreamError
    └── ClusterFailed    it did not come up; the message has what it said last    blame: us
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..sdk.errors import SlipstreamError
from .clock import monotonic_clock
from .ending import ending_on_signals

_DOWN_TIMEOUT_S = 60.0
_READ_BYTES = 1 << 16
_SHOWN_BYTES = 4096
_DOWN = "down"


class ClusterFailed(SlipstreamError):
    """A deployment that was started here did not come up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One rank of a replica: which part of the model it has, and on which device of which node."""

    replica: str
    role: str
    rank: int
    part: str
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningCluster:
    """A deployment that serves. ``url``: of its first gateway, without a path."""

    url: str
    shards: tuple[Shard, ...]


@contextlib.contextmanager
def running_cluster(file: Path, *, start_timeout_s: float, told: Callable[[str], None]) -> Iterator[RunningCluster]:
    """Bring up a cluster file on this machine, on any free port, and take all down whatever happens.

    ``told`` gets a line for everything that happens until it serves. So it is taken down too when this process gets
    SIGTERM or SIGHUP, or a person presses Ctrl-C.
    Raises: ClusterFailed
    """
    with (
        tempfile.TemporaryDirectory(prefix="slipstream-state-") as state,
        tempfile.TemporaryFile() as log,
        ending_on_signals(),
    ):
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        up = _Up(file, {**environment, "XDG_STATE_HOME": state}, log)
        try:
            yield up.wait_until_it_serves(start_timeout_s, told)
        finally:
            up.end()


class _Up:
    """``slipstream up`` as it runs."""

    def __init__(self, file: Path, environment: Mapping[str, str], log: BinaryIO) -> None:
        self._environment = environment
        self._log = log
        self._outcome = ""
        # A session of its own: Ctrl-C in a terminal is for this process, which then tells the other.
        self._process = subprocess.Popen(
            [*_command("up"), "--port", "0", "--json", "--", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            env=environment,
        )

    def wait_until_it_serves(self, timeout_s: float, told: Callable[[str], None]) -> RunningCluster:
        """Return where it serves. Raises: ClusterFailed"""
        for line in self._lines(timeout_s):
            match line:
                case {"event": "serving", "exit_code": 0, "status": dict(status)}:
                    return _cluster(status)
                case {"event": "serving" | "end", "text": str(text)}:
                    raise ClusterFailed(f"the deployment did not come up: {text}{self._last_lines()}")
                case {"text": str(text)}:
                    told(text)
        raise ClusterFailed(f"the deployment ended before it served{self._last_lines()}")

    def end(self) -> None:
        """Take all down; at once when it does not go in time."""
        try:
            self._tell(signal.SIGTERM)
            # It tells of all that ends: a pipe that nobody reads would fill up and stop it.
            with contextlib.suppress(ClusterFailed):
                for line in self._lines(_DOWN_TIMEOUT_S):
                    self._outcome = str(line.get("outcome", self._outcome))
        finally:
            self._tell(signal.SIGKILL)
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()
            if self._outcome != _DOWN:
                # It was ended on its way up or down: whatever there is of it ends now.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    subprocess.run(
                        [*_command("down"), "--now"],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=self._log,
                        env=self._environment,
                        timeout=_DOWN_TIMEOUT_S,
                        check=False,
                    )

    def _tell(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

    def _lines(self, timeout_s: float) -> Iterator[Mapping[str, Any]]:
        """Yield what it tells, until it ends. Raises: ClusterFailed when that takes too long"""
        assert self._process.stdout is not None
        deadline_s, rest = monotonic_clock() + timeout_s, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while (left_s := deadline_s - monotonic_clock()) > 0:
                if not selector.select(left_s):
                    continue
                chunk = os.read(self._process.stdout.fileno(), _READ_BYTES)
                if not chunk:
                    return
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    with contextlib.suppress(ValueError):
                        told = json.loads(line)
                        if isinstance(told, dict):
                            yield told
        raise ClusterFailed(f"it took longer than {timeout_s:g} s{self._last_lines()}")

    def _last_lines(self) -> str:
        # Read in place: the other process writes at the position that it shares with this file.
        size = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), _SHOWN_BYTES, max(0, size - _SHOWN_BYTES)).decode(errors="replace").strip()
        return f"; its last lines:\n{text}" if text else ""


def _command(name: str) -> list[str]:
    return [sys.executable, "-P", "-m", "slipstream.runtime.cli", name, "--address", "local"]


def _cluster(status: Mapping[str, Any]) -> RunningCluster:
    """Return what a status, as ``slipstream status --json`` has it, says of a deployment that serves."""
    try:
        return RunningCluster(
            url=f"http://{status['gateways'][0]['address']}",
            shards=tuple(
                Shard(
                    replica=replica["replica"],
                    role=replica["role"],
                    rank=rank["rank"],
                    part=part_of(rank["rank"], **{axis: replica["degrees"][axis] for axis in ("pp", "ep", "tp")}),
                    device=rank["device"],
                )
                for replica in status["replicas"]
                for rank in replica["ranks"]
            ),
        )
    except (KeyError, IndexError, TypeError) as error:
        raise ClusterFailed(f"the deployment says of itself what cannot be read: {error!r}") from error


def part_of(rank: int, *, pp: int, ep: int, tp: int) -> str:
    """Return in words which part of the model a rank has: ranks count with tp fastest, then ep, then pp."""
    parts = [f"stage {rank // (ep * tp) + 1} of {pp}"] if pp > 1 else []
    parts += [f"experts {rank // tp % ep + 1} of {ep}"] if ep > 1 else []
    parts += [f"part {rank % tp + 1} of {tp} of every layer"] if tp > 1 else []
    return ", ".join(parts) or "the whole model"
