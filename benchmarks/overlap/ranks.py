"""The processes of the ranks, one on each host: asks all the same and reads their answers, within a deadline."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slipstream.tests.multinode.namespaces import Host

_PROGRAM = Path(__file__).resolve().parent / "rank.py"
_PORT = 29631
_START_TIMEOUT_S = 120.0


class RankError(Exception):
    """A rank ended, or did not answer in time."""


class Rank:
    """One rank's process; it reads questions and writes answers, a line of JSON each."""

    def __init__(
        self, host: Host, rank: int, *, ranks: int, address: str, wire_yields: bool, program: Path = _PROGRAM
    ) -> None:
        arguments = {
            "rank": rank,
            "ranks": ranks,
            "address": address,
            "port": _PORT,
            "host-address": host.address,
        }
        options = [f"--{name}={value}" for name, value in arguments.items()]
        options += [] if wire_yields else ["--busy-wire"]
        self.rank = rank
        self._process = subprocess.Popen(
            host.command(sys.executable, "-P", str(program), *options),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        # Two answers at most: one that it is ready, one for the question that is open.
        self._answers: queue.Queue[str] = queue.Queue(maxsize=2)
        self._reader = threading.Thread(target=self._read, name=f"rank-{rank}", daemon=True)
        self._reader.start()

    def ask(self, question: Mapping[str, Any]) -> None:
        """Send a question."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """Return the answer to the last question.

        Raises: RankError
        """
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise RankError(f"rank {self.rank} has not answered within {timeout_s} s") from None
        if not line:
            raise RankError(f"rank {self.rank} ended with status {self._process.wait(10)}; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait(10)
        self._reader.join(10)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")


@contextmanager
def ranks_on(hosts: Sequence[Host], program: Path = _PROGRAM, *, wire_yields: bool = True) -> Iterator[list[Rank]]:
    """Start a rank that runs ``program`` on each host and wait until they have met; on leaving, end them.

    Raises: RankError
    """
    ranks: list[Rank] = []
    try:
        for number, host in enumerate(hosts):
            address = hosts[0].address
            ranks.append(
                Rank(host, number, ranks=len(hosts), address=address, wire_yields=wire_yields, program=program)
            )
        for rank in ranks:
            rank.answer(_START_TIMEOUT_S)
        yield ranks
    finally:
        for rank in ranks:
            rank.close()


def ask_all(ranks: Sequence[Rank], question: Mapping[str, Any], timeout_s: float) -> list[dict[str, Any]]:
    """Ask all ranks the same and return their answers, by rank.

    Raises: RankError
    """
    for rank in ranks:
        rank.ask(question)
    return [rank.answer(timeout_s) for rank in ranks]
