"""The keeper's side of placed ranks: starts their processes, on hosts of their own or on this one, hears and tells.

with keepers(model, [Rank("127.0.0.2"), Rank("127.0.0.3")], "--tensor-parallel-size=2", *where) as ranks:
    introduce(ranks)
    address = ranks[0].hear("ready")["address"]
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipstream.comm.handshake import SECRET_VARIABLE
from slipstream.tests.multinode.namespaces import Host

PATIENCE_S = 120.0
SECRET = "a secret of the tests' cluster"
REPLICA = "chat/1"
COMMAND = (sys.executable, "-P", "-m", "slipstream.runtime.worker.main")
ENGINE = ("--dtype=float32", "--max-model-len=512", "--num-threads=1", "--max-num-seqs=8")


@dataclass(frozen=True, slots=True)
class Rank:
    """Where a rank is: an address, and the host that has it when that is not this one."""

    address: str
    host: Host | None = None
    secret: str | None = SECRET


class Keeper:
    """One rank's process, as whoever keeps it sees it."""

    def __init__(self, command: Sequence[str], *, secret: str | None = SECRET) -> None:
        environment = {name: value for name, value in os.environ.items() if name != SECRET_VARIABLE}
        if secret is not None:
            environment[SECRET_VARIABLE] = secret
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=tempfile.gettempdir(),
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._heard: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        """All that it has printed so far."""
        return "\n".join(self.lines)

    def hear(self, key: str) -> dict[str, Any]:
        """Wait for a line of JSON that has a key."""
        while (line := self._heard.get(timeout=PATIENCE_S)) is not None:
            if line.startswith("{") and key in (value := json.loads(line)):
                return value
        raise AssertionError(f"it ended before it said {key!r}:\n{self.output}")

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def let_go(self) -> None:
        """End the pipe to it, as if this process had ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def exit_status(self) -> int:
        """Wait for its end, and for all that it printed."""
        status = self._process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return status

    def close(self) -> None:
        self._process.kill()
        self.exit_status()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                text = line.decode(errors="replace").rstrip()
                self.lines.append(text)
                self._heard.put(text)
        self._heard.put(None)


def command(model: Path | str, number: int, rank: Rank, *options: str, ranks_on_host: int = 1) -> list[str]:
    """Return a rank's command line, as the controller writes it."""
    own = ("--replica", REPLICA, "--rank", str(number), "--address", rank.address)
    arguments = [*COMMAND, *own, "--ranks-on-host", str(ranks_on_host), *options, str(model)]
    return arguments if rank.host is None else rank.host.command(*arguments)


@contextmanager
def keepers(
    model: Path, ranks: Sequence[Rank], *options: str, engine: Sequence[str] = ENGINE
) -> Iterator[list[Keeper]]:
    """Start a process for every rank, all with the same options; they are ended, whatever happens."""
    with ExitStack() as started:
        made = []
        for number, rank in enumerate(ranks):
            line = command(model, number, rank, *options, *engine, ranks_on_host=len(ranks))
            made.append(Keeper(line, secret=rank.secret))
            started.callback(made[-1].close)
        yield made


def introduce(ranks: Sequence[Keeper]) -> dict[str, Any]:
    """Tell the others where the driver said to meet, wait until all are ready, and return the order that was told."""
    meeting = ranks[0].hear("meeting")["meeting"]
    for other in ranks[1:]:
        other.tell(meeting)
    for other in ranks[1:]:
        other.hear("ready")
    order: dict[str, Any] = json.loads(meeting)
    return order
