"""The Ray of this machine that ``slipstream up`` starts when there is none: started, noted, ended, exactly that one.

Ray listens on the machine's own address, so that it is only started with a token that whoever connects has to know. A
note in the user's state folder says which it is, so that later commands find it and ``down`` ends it by its process; no
other Ray on the machine is touched. Starts ``ray`` as a program and imports none of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...sdk.errors import Blame, SlipstreamError
from ..clock import Clock
from .marked_processes import ProcessMark, end_tree, process_mark
from .node_facts import DEVICE_RESOURCE, NAME_LABEL, TYPE_LABEL
from .private_file import write_private
from .records import BadRecord, from_json, to_json

HOST = "127.0.0.1"
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # A node that dies is given up after seconds, not after a minute.
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "1000",
    # There is no other node that could take over what runs here: told to end, it ends.
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    # The root of a clone must not be on the path of what runs there.
    "PYTHONSAFEPATH": "1",
}
_OBJECT_STORE_BYTES = 100 << 20
_LEAST_DEVICES = 2
_END_PATIENCE_S = 20.0
_LOOK_PERIOD_S = 0.1
_LAST_BYTES = 2_000
_TOKEN_BYTES = 32
_STARTED = "Ray runtime started"


class RayNotStarted(SlipstreamError):
    """Ray could not be started on this machine; its last lines say why."""

    retryable = True
    blame = Blame.PEER


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRay:
    """A Ray that was started here."""

    address: str
    process: ProcessMark

    @property
    def runs(self) -> bool:
        """Whether it still does."""
        there = process_mark(self.process.pid)
        return there is not None and abs(there.born_s - self.process.born_s) < 1.0


class LocalRays:
    """Where the local Ray is noted: ``folder``/ray.json."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._note = folder / "ray.json"
        self._token = folder / "ray.token"

    @property
    def client_environment(self) -> dict[str, str]:
        """What both who starts it and who connects to it have to say."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self._token)}

    def find(self) -> LocalRay | None:
        """Return the one that runs."""
        with contextlib.suppress(OSError, BadRecord):
            noted = from_json(LocalRay, self._note.read_text(encoding="utf-8"))
            return noted if noted.runs else None
        return None

    def start(self, *, timeout_s: float, clock: Clock) -> LocalRay:
        """Start one, and note it. Raises: RayNotStarted"""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(self._token, secrets.token_hex(_TOKEN_BYTES))
        port = _free_port()
        log = self._folder / "ray.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                _command(port),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT, **self.client_environment},
                # It outlives this command; and Ctrl-C in the terminal is not for it.
                start_new_session=True,
                # Ray puts the folder that it is started in on the path of what runs there.
                cwd=tempfile.gettempdir(),
            )
        noted = process_mark(process.pid)
        started = False
        try:
            started = noted is not None and _wait_started(process, log, timeout_s=timeout_s, clock=clock)
        finally:
            if not started:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_END_PATIENCE_S)
                process.kill()
        if noted is None or not started:
            raise RayNotStarted(f"Ray did not start on this machine within {timeout_s:g} s: {_last_lines(log)}")
        local = LocalRay(address=f"{HOST}:{port}", process=noted)
        self._note.write_text(to_json(local), encoding="utf-8")
        return local

    def end(self) -> bool:
        """End the one that was started here, and no other; return whether it ran."""
        local = self.find()
        ended = local is not None and end_tree(local.process, patience_s=_END_PATIENCE_S)
        self._note.unlink(missing_ok=True)
        self._token.unlink(missing_ok=True)
        return ended


def state_folder(environment: Mapping[str, str]) -> Path:
    """Return where this user's commands keep notes."""
    given = environment.get("XDG_STATE_HOME")
    return (Path(given) if given else Path.home() / ".local" / "state") / "slipstream"


def own_devices(cores: int, *, has_gpus: bool) -> dict[str, float]:
    """Return the resources that stand for this machine's devices: its cores, unless Ray finds GPUs itself.

    Two at least: a prefill and a decode replica are to have a place on any machine.
    """
    return {} if has_gpus else {f"{DEVICE_RESOURCE}{index}": 1.0 for index in range(max(_LEAST_DEVICES, cores))}


def _command(port: int) -> list[str]:
    cores = os.cpu_count() or 1
    has_gpus = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()
    labels = {NAME_LABEL: socket.gethostname().partition(".")[0].lower() or "local"}
    if not has_gpus:
        labels[TYPE_LABEL] = "cpu-core"
    return [
        sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--head", "--block",
        "--port", str(port), "--include-dashboard", "false", "--disable-usage-stats",
        "--object-store-memory", str(_OBJECT_STORE_BYTES),
        "--resources", json.dumps(own_devices(cores, has_gpus=has_gpus)),
        "--labels", ",".join(f"{name}={value}" for name, value in labels.items()),
    ]  # fmt: skip


def _wait_started(process: subprocess.Popen[bytes], log: Path, *, timeout_s: float, clock: Clock) -> bool:
    deadline_s, never = clock() + timeout_s, threading.Event()
    while process.poll() is None and clock() < deadline_s:
        if _STARTED in log.read_text(encoding="utf-8", errors="replace"):
            return True
        never.wait(_LOOK_PERIOD_S)
    return False


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as free:
        return int(free.getsockname()[1])


def _last_lines(log: Path) -> str:
    text = log.read_bytes()[-_LAST_BYTES:].decode(errors="replace")
    return " | ".join(line.strip() for line in text.splitlines() if line.strip())[-_LAST_BYTES:]
