"""Clients on a host of this machine that ask for streams all the time, and note when each token came."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from slipstream.runtime.clock import monotonic_clock
from slipstream.tests.multinode.namespaces import Host

_PAUSE_S = 0.2
"""After a refusal, so that one that goes on does not fill the report."""


@dataclass(slots=True)
class Asked:
    """One request: when it was sent, when pieces of its answer came, when it was over, and what was wrong with it."""

    began_s: float
    pieces_s: list[float] = field(default_factory=list)
    ended_s: float | None = None
    text: str = ""
    problem: str = ""

    def longest_wait_s(self, from_s: float) -> float:
        """Return the longest time without news that ended after a moment."""
        times = [self.began_s, *self.pieces_s, monotonic_clock() if self.ended_s is None else self.ended_s]
        return max((after - before for before, after in itertools.pairwise(times) if after > from_s), default=0)


@dataclass(slots=True)
class Load:
    """All that was asked. ``wrong``: answers that are not what they have to be; ``failed``: requests without one."""

    asked: list[Asked] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def answered(self) -> int:
        return sum(each.ended_s is not None and not each.problem for each in list(self.asked))

    @property
    def failed(self) -> list[str]:
        return [each.problem for each in list(self.asked) if each.problem]

    def in_flight(self, at_s: float) -> list[Asked]:
        """Return the requests that were on their way at a moment."""
        return [
            each for each in list(self.asked) if each.began_s <= at_s and (each.ended_s is None or each.ended_s > at_s)
        ]

    def longest_wait_s(self, at_s: float) -> float:
        """Return the longest time without news of a request that was on its way when something happened."""
        return max((each.longest_wait_s(at_s) for each in self.in_flight(at_s)), default=0.0)

    def told(self, what: str, at_s: float) -> str:
        """Say how requests fared that were on their way when something happened."""
        met, waited_s = len(self.in_flight(at_s)), self.longest_wait_s(at_s)
        return f"{what}: {met} requests in flight, the longest wait for a token {waited_s:.2f} s"


@contextmanager
def stream_load(
    host: Host, url: str, questions: Sequence[tuple[dict[str, object], str]], *, clients: int, patience_s: float
) -> Iterator[Load]:
    """Let clients on a host ask, one question after the other each, and hold answers against what is right."""
    load, ending, writing = Load(), threading.Event(), threading.Lock()

    def ask_all_the_while(first: int) -> None:
        with httpx.Client(timeout=patience_s, trust_env=False) as client:
            turn = first
            while not ending.is_set():
                body, right = questions[turn % len(questions)]
                turn += 1
                asked = Asked(began_s=monotonic_clock())
                with writing:
                    load.asked.append(asked)
                asked.problem = _stream(client, url, body, asked)
                asked.ended_s = monotonic_clock()
                if asked.problem:
                    ending.wait(_PAUSE_S)
                elif asked.text != right:
                    with writing:
                        load.wrong.append(f"{body['prompt']!r}: {asked.text!r} in place of {right!r}")

    with ThreadPoolExecutor(clients, thread_name_prefix="client", initializer=host.enter) as pool:
        running: list[Future[None]] = [pool.submit(ask_all_the_while, first) for first in range(clients)]
        try:
            yield load
        finally:
            ending.set()
            for each in running:
                each.result(patience_s)


def _stream(client: httpx.Client, url: str, body: dict[str, object], asked: Asked) -> str:
    """Ask for one stream and note what comes; why it was not whole, "" if it was."""
    reason = None
    try:
        with client.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}) as reply:
            if reply.status_code != httpx.codes.OK:
                return f"{reply.status_code}: {reply.read().decode()}"
            for line in reply.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return f"in the stream: {event['error']}"
                (choice,) = event["choices"]
                asked.pieces_s.append(monotonic_clock())
                asked.text += choice["text"]
                reason = choice["finish_reason"] or reason
    except httpx.HTTPError as error:
        return f"{type(error).__name__}: {error}"
    return "" if reason else "the stream ended before the answer did"
