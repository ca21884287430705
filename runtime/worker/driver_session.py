"""One gateway's session with an engine, seen from both threads.

``DriverSession`` is the asyncio side: commands go into the engine's inbox, events come out of a bounded outbox.
``News`` collects, on the engine's thread, what a step meant for the session.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from ...sdk.errors import EngineUnavailable, Overloaded, SlipstreamError
from ..engine.sequence import Sequence
from ..handoff.desk import DeskEvent
from ..messages import EngineRequest, FinishReason, TokenLogprobs
from ..rpc.engine_client import EngineLoadReport, PromptScores
from ..rpc.outbox import Outbox
from ..rpc.session import Closed, Command, Ending, Event, Rejected, StepNews, Submit
from .inbox import Inbox

# Numbers of prompt log-probabilities in one event: keeps a long prompt's well below what a message may hold.
_SCORES_PER_EVENT = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Enter:
    """The session is there: wakes an engine that sleeps, so that load is told from now on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """The session is over: abort what it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A request's constraint is compiled, or cannot be: it may start, or has failed."""

    submit: Submit
    error: SlipstreamError | None


Post = tuple["DriverSession", Command | Enter | Leave | Compiled] | DeskEvent


class DriverSession:
    """A session's face towards its server or client; see ``HostSession``. Safe to call from any thread.

    ``max_commands``: commands of all sessions that may wait for the engine's thread
    """

    def __init__(self, number: int, inbox: Inbox[Post], outbox: Outbox, *, max_commands: int) -> None:
        self.number = number
        self._inbox = inbox
        self._outbox = outbox
        self._max_commands = max_commands
        self._lock = threading.Lock()
        self._over = False

    def send(self, command: Command) -> None:
        """Take a command. A submit too many is refused; any other too many ends the session."""
        # Aborts make room, so they may wait where a submit may not; a well-behaved gateway never has this many.
        limit = self._max_commands if isinstance(command, Submit) else 2 * self._max_commands
        if self._inbox.put((self, command), limit=limit):
            return
        error: SlipstreamError = Overloaded(f"{limit} commands wait for the engine already")
        if self._inbox.closed:
            error = EngineUnavailable("the engine has stopped")
        if isinstance(command, Submit):
            self.refuse(command.key, error)
        elif not self._inbox.closed:
            self.end(error)

    async def receive(self) -> list[Event]:
        """Wait for the next events; [] when this side has closed."""
        return await self._outbox.get()

    def refuse(self, key: int, error: SlipstreamError) -> None:
        """Answer a request with an error."""
        self.post([Rejected(key=key, error=error)])

    def post(self, events: list[Event]) -> bool:
        """Hand events over to the gateway; when it is too far behind, end the session and return False."""
        if self._outbox.put(events):
            return True
        slow = Overloaded("the gateway does not read its news: its session is ended and its requests are aborted")
        self._leave([Closed(error=slow)], discard=True)
        return False

    def end(self, error: SlipstreamError) -> None:
        """End the session from this side: ``Closed`` is the last event, after those not read yet."""
        self._leave([Closed(error=error)], discard=False)

    def close(self) -> None:
        """End the session from the gateway's side."""
        self._leave([], discard=True)

    def _leave(self, last: list[Event], *, discard: bool) -> None:
        with self._lock:
            if self._over:
                return
            self._over = True
        self._outbox.finish(last, discard=discard)
        self._inbox.put((self, Leave()))


@dataclass(slots=True, kw_only=True, eq=False)
class LiveRequest:
    """A request that has not ended, on the engine's thread, where ``engine_id`` is its name.

    It has no sequences while its constraint is being compiled, and while it waits for its KV under ``ticket``:
    ``waiting`` is what it would submit then. ``sent_on``: its KV goes to another replica, and ``handed`` says that its
    token was drawn and went with it. ``last``: the newest token of one that is sent on, with its scores.
    Units: deadline_s, seconds on the engine's clock
    """

    news: News
    key: int
    engine_id: str
    deadline_s: float
    sequences: list[Sequence] = field(default_factory=list)
    open_samples: int = 0
    ticket: str = ""
    waiting: EngineRequest | None = None
    sent_on: bool = False
    handed: bool = False
    last: tuple[int, TokenLogprobs | None] | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class News:
    """A session on the engine's thread: its live requests, and what has happened since the last post.

    ``knows_blocks``: whether it was told what is cached, and is told of every change since.
    """

    session: DriverSession
    live: dict[int, LiveRequest] = field(default_factory=dict)
    keys: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    scores: list[tuple[int, PromptScores]] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)
    others: list[Event] = field(default_factory=list)
    wants_drained: bool = False
    knows_blocks: bool = False

    def add_token(self, key: int, index: int, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Note a sample's next token."""
        if logprobs is not None:
            self.logprobs[len(self.keys)] = logprobs
        self.keys.append(key)
        self.indices.append(index)
        self.token_ids.append(token_id)

    def add_scores(self, key: int, position: int, entries: tuple[TokenLogprobs, ...]) -> None:
        """Note prompt log-probabilities, in parts that fit into a message."""
        each = max(1, _SCORES_PER_EVENT // len(entries[0].token_ids))
        for start in range(0, len(entries), each):
            part = PromptScores(position=position + start, entries=entries[start : start + each])
            self.scores.append((key, part))

    def add_ending(self, live: LiveRequest, sequence: Sequence) -> None:
        """Note a sample's end."""
        assert sequence.finish_reason is not None, f"{sequence} has not ended"
        started_s = sequence.first_scheduled_time_s
        self.endings.append(
            Ending(
                key=live.key,
                index=sequence.index,
                reason=sequence.finish_reason,
                stop_token_id=sequence.stop_token_id,
                # The samples share their prompt: what the cache had of it is counted once.
                cached_tokens=(sequence.cached_tokens or 0) if sequence.index == 0 else 0,
                preemptions=sequence.preemptions,
                queue_s=None if started_s is None else max(0.0, started_s - sequence.request.arrival_time_s),
            )
        )

    def add_unbegun_ending(self, live: LiveRequest) -> None:
        """Note the end of the sample of a request that waited for its KV."""
        ending = Ending(
            key=live.key,
            index=0,
            reason=FinishReason.ABORT,
            stop_token_id=None,
            cached_tokens=0,
            preemptions=0,
            queue_s=None,
        )
        self.endings.append(ending)

    def take(self, load: EngineLoadReport) -> list[Event]:
        """Return everything noted since the last time as events, at most one of them with tokens; [] when nothing."""
        events, self.others = self.others, []
        if self.scores:
            *before, last = list(self._score_groups())
            events += [_step_news(load, prompt_scores=scores) for scores in before]
            self.scores = last
        if self.keys or self.endings or self.scores:
            events.append(
                StepNews(
                    keys=self.keys,
                    indices=self.indices,
                    token_ids=self.token_ids,
                    logprobs=self.logprobs,
                    prompt_scores=self.scores,
                    endings=self.endings,
                    load=load,
                )
            )
            self.keys, self.indices, self.token_ids, self.logprobs = [], [], [], {}
            self.scores, self.endings = [], []
        return events

    def _score_groups(self) -> Iterator[list[tuple[int, PromptScores]]]:
        group: list[tuple[int, PromptScores]] = []
        numbers = 0
        for key, part in self.scores:
            size = sum(len(entry.token_ids) for entry in part.entries)
            if group and numbers + size > _SCORES_PER_EVENT:
                yield group
                group, numbers = [], 0
            group.append((key, part))
            numbers += size
        yield group


def _step_news(load: EngineLoadReport, *, prompt_scores: list[tuple[int, PromptScores]]) -> StepNews:
    return StepNews(keys=[], indices=[], token_ids=[], logprobs={}, prompt_scores=prompt_scores, endings=[], load=load)
