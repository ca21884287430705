"""Kernels that are compiled ahead of time beside the other tests, in processes of the lowest priority."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

LOWEST_PRIORITY = 19


class CompilingAhead:
    """One run of the command that compiles everything; its processes are a group of their own."""

    def __init__(self) -> None:
        """Begin."""
        self._folder = tempfile.TemporaryDirectory(prefix="compiling-ahead-")
        self._report = Path(self._folder.name) / "kernels.json"
        self._log = open(Path(self._folder.name) / "log", "w+b")  # noqa: SIM115 (closed by ``end``)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "slipstream.kernels.compile_ahead", "--json", str(self._report)],
            # Here kernels are interpreted.
            env={**os.environ, "TRITON_INTERPRET": "0"},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: os.nice(LOWEST_PRIORITY),
        )
        # Whoever looks at the children of this process meanwhile should find none that has ended.
        self._waiter = Thread(target=self._process.wait, name="compiling-ahead", daemon=True)
        self._waiter.start()

    def wait(self, seconds: float) -> tuple[int, str, list[dict[str, Any]]]:
        """Return the status, what was printed, and what every kernel takes. Raises: subprocess.TimeoutExpired"""
        self._waiter.join(seconds)
        status = self._process.wait(0)
        self._log.seek(0)
        resources = json.loads(self._report.read_text()) if self._report.exists() else []
        return status, self._log.read().decode(errors="replace"), resources

    def end(self) -> None:
        """End it, whatever it is at."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._waiter.join(60)
        self._log.close()
        self._folder.cleanup()
