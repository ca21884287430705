"""The test's end of rank processes: start them, tell them what to do, hear what came of it, stop and kill them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slipstream.tests.comm.rank_process import Line, serve
from slipstream.tests.multinode.namespaces import Host

PATIENCE_S = 60.0
"""How long a test waits for anything before it calls it a hang."""

LOOPBACK = "127.0.0.1"


class RankFailed(AssertionError):
    """A rank raised; the message has its traceback."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a command."""

    result: Any
    error: str | None
    message: str
    traceback: str
    took_s: float


# One process loads torch, once, and every rank is a copy of it.
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["slipstream.tests.comm.rank_acts", "slipstream.tests.contracts.collectives"])


class RankProcess:
    """One process that is a rank, on this machine's network or on a host of its own."""

    def __init__(self, host: Host | None = None) -> None:
        self.address = LOOPBACK if host is None else host.address
        self.port = 0  # where it hosts a rendezvous, once it does
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = _forks.Process(target=serve, args=(theirs, host), daemon=True)
            self._process.start()
        ours.settimeout(PATIENCE_S)
        self._line = Line(ours)

    def hear(self, event: str) -> None:
        """Wait until the rank tells of an event."""
        message = self._line.get()
        assert message == {"event": event}, message

    def tell(self, do: str, **arguments: Any) -> None:
        """Give a command, without waiting for what comes of it."""
        self._line.put({"do": do, **arguments})

    def answer(self) -> Answer:
        """Wait for what came of a command."""
        message = self._line.get()
        assert message is not None and "event" not in message, message
        return Answer(
            result=message.get("result"),
            error=message.get("error"),
            message=message.get("message", ""),
            traceback=message.get("traceback", ""),
            took_s=message["took_s"],
        )

    def do(self, do: str, **arguments: Any) -> Any:
        """Give a command and return its result."""
        self.tell(do, **arguments)
        return result_of(self.answer())

    def stop(self) -> None:
        """Freeze the process where it is."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen process go on."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End the process at once, frozen or not; its connections break."""
        self._process.kill()
        self._process.join(PATIENCE_S)
        self._line.socket.close()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)


def name_of(function: Callable[..., object]) -> str:
    """Return how a rank's process finds a function."""
    return f"{function.__module__}:{function.__name__}"


def result_of(answer: Answer) -> Any:
    """Return an answer's result, or raise what the rank raised."""
    if answer.error is not None:
        raise RankFailed(answer.traceback)
    return answer.result


def together(ranks: Sequence[RankProcess], do: str, each: Callable[[int], dict[str, Any]]) -> list[Answer]:
    """Give all ranks a command, each with its own arguments, and wait for all answers."""
    for place, rank in enumerate(ranks):
        rank.tell(do, **each(place))
    return [rank.answer() for rank in ranks]


def open_together(
    ranks: Sequence[RankProcess],
    *,
    generation: int,
    name: str = "group",
    timeout_s: float = 30.0,
    open_timeout_s: float = 30.0,
) -> None:
    """Have processes open one group, in the order of the sequence."""
    answers = together(
        ranks,
        "open",
        lambda place: {
            "name": name,
            "generation": generation,
            "rank": place,
            "size": len(ranks),
            "address": ranks[place].address,
            "timeout_s": timeout_s,
            "open_timeout_s": open_timeout_s,
        },
    )
    for answer in answers:
        result_of(answer)


def meet(ranks: Sequence[RankProcess]) -> None:
    """Have processes meet at a rendezvous that the first of them hosts."""
    ranks[0].port = ranks[0].do("host", address=ranks[0].address)
    for rank in ranks[1:]:
        rank.tell("join", address=ranks[0].address, port=ranks[0].port)
    for rank in ranks[1:]:
        result_of(rank.answer())
