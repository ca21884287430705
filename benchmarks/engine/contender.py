"""A contender: a process that runs points on request, stopped (SIGSTOP) while it is not its turn.

Owns the processes, their deadlines and their end; ``peers/worker.py`` is the other side. A stopped process keeps its
memory and costs nothing, whatever its libraries' threads would do while they wait.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

_LOADER = Path(__file__).resolve().parents[1] / "peers" / "worker.py"


class ContenderError(Exception):
    """A contender could not be loaded, failed, or did not answer in time."""

    def __init__(self, name: str, problem: str, log: Path) -> None:
        super().__init__(f"{name}: {problem} (log: {log})")


class Contender:
    """One running contender. Use as a context manager: leaving it ends the process and all that it has started.

    ``command`` is the interpreter with its options, ``worker`` a file of ``peers/``, ``options`` go to its ``load``.
    Raises: ContenderError when it does not load in time.
    """

    def __init__(
        self,
        name: str,
        *,
        command: list[str],
        worker: str,
        options: Mapping[str, Any],
        environment: Mapping[str, str],
        log: Path,
        load_timeout_s: float,
    ) -> None:
        self.name = name
        self._log = log
        self._stopped = False
        self.dead = False
        """Whether the process has ended, or does not answer any more: then it can only be closed."""
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [*command, str(_LOADER), str(_LOADER.parent / worker), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **environment},
                # A group of its own, so that its children are stopped and ended with it.
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            if "error" in (answer := self._take(load_timeout_s)):
                raise ContenderError(name, answer["error"], log)
        except BaseException:
            self.close()
            raise
        self._stop()

    @property
    def process_id(self) -> int:
        """The worker's process, which leads its group."""
        return self._process.pid

    def run(self, request: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Let the process go on, run one request and stop the process again.

        Raises: ContenderError; ``dead`` says whether other requests may be tried.
        """
        self._continue()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            self.dead = True
            raise ContenderError(self.name, "the process has ended", self._log) from error
        answer = self._take(timeout_s)
        self._stop()
        if "error" in answer:
            raise ContenderError(self.name, answer["error"], self._log)
        return answer

    def close(self) -> None:
        """End the process and its children at once: nothing in them is worth keeping."""
        if self._process.poll() is None:
            self._signal(signal.SIGKILL)
        self._process.wait(timeout=30)
        self._reader.join(timeout=30)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()

    def __enter__(self) -> Contender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def _take(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            self.dead = True
            raise ContenderError(self.name, f"no answer within {timeout_s:.0f} s", self._log) from None
        if line is None:
            self.dead = True
            status = self._process.wait(timeout=30)
            raise ContenderError(self.name, f"the process ended with status {status}", self._log)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _stop(self) -> None:
        self._signal(signal.SIGSTOP)
        self._stopped = True

    def _continue(self) -> None:
        if self._stopped:
            self._signal(signal.SIGCONT)
            self._stopped = False

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            # It has ended by itself; whoever asks it next will be told.
            return
