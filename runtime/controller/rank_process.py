"""One rank's process, or a gateway's: started, watched, ended with all it has started itself.

It speaks in lines of JSON on standard output: ``{"ready": true}``, a driver with its ``address``; before that
``{"loaded": share}`` says how much of its weights it has, and a driver may say how the other ranks find it,
``{"meeting": text}``: they get that text as a line on standard input. That is a pipe, and ends with this process: by
that a rank notices that nobody keeps it any more. All other lines are its log.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

from .process_log import ProcessLog

_LAST_LINES = 8
_LINE_BYTES = 16_384
_END_TIMEOUT_S = 10.0


class RankProcess:
    """A process that runs, or has ended. ``log``: what it has printed last."""

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start ``python -P -m module arguments``. Raises: OSError"""
        self._ready = threading.Event()
        self._address = ""
        self._meeting = ""
        self._loaded = 0.0
        self._told = False
        self.log = ProcessLog()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            # Whatever it starts is ended with it.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="slipstream-rank-output", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    @property
    def ready(self) -> bool:
        """Whether it has said that it is."""
        return self._ready.is_set()

    @property
    def address(self) -> str:
        """Where a driver takes requests; "" of another rank, and before it is ready."""
        return self._address

    @property
    def meeting(self) -> str:
        """What a driver wants the other ranks to know, "" before it has said so."""
        return self._meeting

    @property
    def loaded(self) -> float:
        """The share of its weights that it has read, as far as it has said."""
        return 1.0 if self.ready else self._loaded

    @property
    def told(self) -> bool:
        """Whether the process has been told where to meet."""
        return self._told

    def tell(self, meeting: str) -> None:
        """Tell a rank where to meet, once; one that has ended hears nothing."""
        if self._told or self._process.stdin is None:
            return
        self._told = True
        with contextlib.suppress(OSError):
            self._process.stdin.write(meeting.encode() + b"\n")
            self._process.stdin.flush()

    def ended(self) -> str | None:
        """Return how it ended, with its last lines; None while it runs."""
        status = self._process.poll()
        if status is None:
            return None
        lines = " | ".join(self.log.page(-_LAST_LINES).lines)
        return f"its process ended with status {status}" + (f": {lines}" if lines else "")

    def wait_ended(self, timeout_s: float) -> int | None:
        """Wait until it has ended and return its status, None if it has not in this time."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def ask_to_end(self) -> None:
        """Let it finish what runs, and end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def end(self) -> None:
        """End it at once, with all that it has started. Idempotent."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_TIMEOUT_S)
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        self._reader.join(_END_TIMEOUT_S)

    def _read(self) -> None:
        """Take what it prints, to the end: a pipe that nobody reads would stop it."""
        assert self._process.stdout is not None
        with self._process.stdout as output:
            while line := output.readline(_LINE_BYTES):
                self._take(line.decode(errors="replace").rstrip())

    def _take(self, line: str) -> None:
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        match value:
            case {"ready": True, **rest}:
                self._address = str(rest.get("address", ""))
                self._ready.set()
            case {"meeting": str(meeting)} if "\n" not in meeting:
                self._meeting = meeting
            case {"loaded": float() | int() as share}:
                self._loaded = min(max(float(share), 0.0), 1.0)
            case _ if line:
                self.log.add(line)
                # The log of whoever keeps the process is the rank's.
                print(line, file=sys.stderr, flush=True)
