"""The driver's step loop: an engine on a thread of its own, and the sessions that it serves.

Owns the engine: nobody else touches it. Commands come in through a bounded inbox, where the thread sleeps while there
is nothing to do; after every step each session is posted at most one batch of news, into a bounded outbox. A gateway
that does not read loses its session, never the engine's memory; one that leaves has its requests aborted.

Knows nothing of gRPC; a session's outbox wakes the event loop that reads it. On a request's way: between the
engine protocol and the scheduler, in and out.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from ...sdk.errors import (
    DeadlineExceeded,
    EngineUnavailable,
    InvalidRequest,
    Overloaded,
    SlipstreamError,
)
from ..clock import Clock
from ..engine.engine import Engine
from ..engine.outputs import StepOutputs
from ..engine.sequence import Sequence, SequenceState
from ..rpc.engine_client import EngineFacts, EngineLoadReport
from ..rpc.outbox import Outbox
from ..rpc.session import Abort, AbortSample, Command, Drain, Drained, Load, Opened, Rejected, Submit
from .driver_session import Compiled, DriverSession, Enter, Leave, LiveRequest, News, Post
from .grammar_gate import ConstraintCompiler, GrammarGate
from .inbox import Inbox

logger = logging.getLogger(__name__)

_STALE_DEADLINES = 4096  # of requests that have ended, kept before they are swept out


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverLimits:
    """Bounds of everything that waits in a driver.

    - ``max_sessions``: gateways at once. ``max_commands``: submits that wait for the engine's thread.
    - ``max_unread``: numbers (tokens, log-probabilities) that a gateway may leave unread.

    Units: load_period_s, seconds between load reports while no step brings them
    """

    max_sessions: int = 64
    max_commands: int = 8192
    max_unread: int = 1 << 20
    load_period_s: float = 1.0


class EngineLoop:
    """An engine in motion; an ``EngineHost``. Call ``start`` once, ``close`` at the end.

    ``check`` is called while there is nothing to do, and ends the engine by raising something: a rank may be lost then
    too.
    """

    def __init__(
        self,
        engine: Engine,
        facts: EngineFacts,
        *,
        clock: Clock,
        limits: DriverLimits | None = None,
        compiler: ConstraintCompiler | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._facts = facts
        self._clock = clock
        self._limits = limits or DriverLimits()
        self._check = check
        self._inbox: Inbox[Post] = Inbox()
        self._gate = GrammarGate(compiler)
        self._thread = threading.Thread(target=self._run, name="slipstream-engine", daemon=True)
        # Shared by the threads, under the lock.
        self._lock = threading.Lock()
        self._sessions: dict[DriverSession, News] = {}
        self._session_numbers = itertools.count(1)
        self._failure: SlipstreamError | None = None
        self._latest: EngineLoadReport = self._report(draining=False)
        # The engine's thread alone.
        self._live: dict[str, LiveRequest] = {}
        self._deadlines: list[tuple[float, str]] = []
        self._draining = False
        self._load_due_s = 0.0

    # ------------------------------------------------------------------ any thread

    @property
    def facts(self) -> EngineFacts:
        """What this replica is."""
        return self._facts

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def open_session(self) -> DriverSession:
        """Open a session whose events are received on the running event loop; see ``EngineHost``."""
        outbox = Outbox(asyncio.get_running_loop(), max_weight=self._limits.max_unread)
        with self._lock:
            if self._failure is not None:
                raise EngineUnavailable(str(self._failure))
            if len(self._sessions) >= self._limits.max_sessions:
                raise Overloaded(f"{len(self._sessions)} gateways are connected already")
            session = DriverSession(
                next(self._session_numbers), self._inbox, outbox, max_commands=self._limits.max_commands
            )
            self._sessions[session] = News(session=session)
            session.post([Opened(epoch=self._facts.epoch, load=self._latest)])
        self._inbox.put((session, Enter()))
        return session

    def close(self, *, timeout_s: float) -> bool:
        """Stop after the step that runs: every session ends. Return whether the thread ended in time. Idempotent."""
        self._inbox.close()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # ------------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        failure = EngineUnavailable("the engine was stopped")
        try:
            while (posts := self._inbox.take(wait_s=self._patience_s())) is not None:
                for session, command in posts:
                    self._carry_out(session, command)
                self._end_overdue()
                if self._engine.has_work:
                    self._note(self._engine.step())
                else:
                    self._check()
                self._post()
        except Exception as error:
            # Whatever it was, the engine's state is not to be trusted any more, and everybody who waits must hear it.
            logger.exception("the engine failed")
            failure = EngineUnavailable(f"the engine failed: {error}")
        finally:
            self._gate.close()
            self._end_all(failure)
            self._close_engine()

    def _patience_s(self) -> float | None:
        if self._engine.has_work:
            return 0.0
        if not self._sessions:
            return None
        next_deadline_s = self._deadlines[0][0] - self._clock() if self._deadlines else self._limits.load_period_s
        return max(0.0, min(self._limits.load_period_s, next_deadline_s))

    def _carry_out(self, session: DriverSession, command: Command | Enter | Leave | Compiled) -> None:
        with self._lock:
            news = self._sessions.get(session)
        if news is None:
            return
        match command:
            case Submit():
                self._submit(news, command)
            case Compiled():
                self._go_on(news, command)
            case Abort(key=key):
                if (live := news.live.get(key)) is not None:
                    self._forget(live)
                    self._engine.abort(live.engine_id)
            case AbortSample(key=key, index=index):
                if (live := news.live.get(key)) is not None and index < len(live.sequences):
                    self._abort_sample(live, live.sequences[index])
            case Drain():
                self._draining = news.wants_drained = True
            case Enter():
                pass
            case Leave():
                self._leave(news)

    def _submit(self, news: News, submit: Submit) -> None:
        try:
            if self._draining:
                raise EngineUnavailable("the replica is draining and takes no more requests")
            if submit.key in news.live:
                raise InvalidRequest("key", f"{submit.key} is in use by a request that has not ended")
            live = self._admit(news, submit)
        except SlipstreamError as error:
            news.others.append(Rejected(key=submit.key, error=error))
            return
        news.live[live.key] = self._live[live.engine_id] = live
        if len(self._deadlines) > 2 * len(self._live) + _STALE_DEADLINES:
            self._deadlines = [(other.deadline_s, other.engine_id) for other in self._live.values()]
            heapq.heapify(self._deadlines)
        else:
            heapq.heappush(self._deadlines, (live.deadline_s, live.engine_id))

    def _admit(self, news: News, submit: Submit) -> LiveRequest:
        """Start a request, or have its constraint compiled first."""
        prompt, vocab_size = submit.request.prompt_token_ids, self._facts.vocab_size
        if len(prompt) and not 0 <= int(prompt.min()) <= int(prompt.max()) < vocab_size:
            raise InvalidRequest("prompt_token_ids", f"a token is outside the vocabulary of {vocab_size}")
        # The session's number keeps the names of two gateways apart.
        live = LiveRequest(
            news=news,
            key=submit.key,
            engine_id=f"{news.session.number}/{submit.request.request_id}",
            deadline_s=self._clock() + submit.timeout_s,
        )
        if live.engine_id in self._live:
            raise InvalidRequest(
                "request_id", f"{submit.request.request_id!r} is in use by a request that has not ended"
            )
        constraint = submit.request.params.structured_outputs
        if constraint is None or not self._gate.begin(constraint, partial(self._compiled, news.session, submit)):
            self._start(live, submit)
        return live

    def _compiled(self, session: DriverSession, submit: Submit, error: SlipstreamError | None) -> None:
        """Called from a compiling thread; an engine that has stopped wants no more."""
        self._inbox.put((session, Compiled(submit=submit, error=error)))

    def _go_on(self, news: News, compiled: Compiled) -> None:
        """Start a request whose constraint is compiled, if it is still wanted, or refuse it."""
        if (live := news.live.get(compiled.submit.key)) is None:
            return
        try:
            if compiled.error is not None:
                raise compiled.error
            self._start(live, compiled.submit)
        except SlipstreamError as error:
            self._forget(live)
            news.others.append(Rejected(key=live.key, error=error))

    def _start(self, live: LiveRequest, submit: Submit) -> None:
        request = replace(submit.request, request_id=live.engine_id, arrival_time_s=self._clock())
        live.sequences = self._engine.submit(request)
        live.open_samples = len(live.sequences)

    def _abort_sample(self, live: LiveRequest, sequence: Sequence) -> None:
        if sequence.state is not SequenceState.FINISHED:
            self._engine.scheduler.abort_sequence(sequence)
            self._end_sample(live, sequence)

    def _end_overdue(self) -> None:
        """End requests whose time is over, also when their gateway forgot to, or cannot."""
        while self._deadlines and self._deadlines[0][0] <= self._clock():
            deadline_s, engine_id = heapq.heappop(self._deadlines)
            live = self._live.get(engine_id)
            # A name may have come back since, with a later deadline.
            if live is not None and live.deadline_s == deadline_s:
                self._forget(live)
                self._engine.abort(engine_id)
                late = DeadlineExceeded("the request did not end within its time")
                live.news.others.append(Rejected(key=live.key, error=late))

    def _note(self, outputs: StepOutputs) -> None:
        """Sort a step's outputs to the sessions that they belong to."""
        requests = self._live
        for sequence, position, entries in outputs.prompt_logprobs:
            if (live := requests.get(sequence.request.request_id)) is not None:
                live.news.add_scores(live.key, position, entries)
        logprobs = outputs.logprobs
        for place, (sequence, token_id) in enumerate(zip(outputs.sequences, outputs.token_ids, strict=True)):
            if (live := requests.get(sequence.request.request_id)) is not None:
                live.news.add_token(live.key, sequence.index, token_id, logprobs.get(place))
        for sequence in outputs.finished:
            if (live := requests.get(sequence.request.request_id)) is not None:
                self._end_sample(live, sequence)

    def _end_sample(self, live: LiveRequest, sequence: Sequence) -> None:
        live.news.add_ending(live, sequence)
        live.open_samples -= 1
        if not live.open_samples:
            self._forget(live)

    def _forget(self, live: LiveRequest) -> None:
        del self._live[live.engine_id]
        del live.news.live[live.key]

    def _leave(self, news: News) -> None:
        with self._lock:
            self._sessions.pop(news.session, None)
        for live in list(news.live.values()):
            self._forget(live)
            self._engine.abort(live.engine_id)

    # ------------------------------------------------------------------ news

    def _post(self) -> None:
        """Post every session what there is for it: at most one batch a step."""
        # A request that waits for its constraint is live without being work.
        idle, now_s = not self._engine.has_work and not self._live, self._clock()
        load = self._report(draining=self._draining)
        tell_all = now_s >= self._load_due_s or (idle and load != self._latest)
        if tell_all:
            self._load_due_s = now_s + self._limits.load_period_s
        with self._lock:
            self._latest = load
            sessions = list(self._sessions.values())
        for news in sessions:
            events = news.take(load)
            if tell_all and not events:
                events.append(Load(load=load))
            if idle and news.wants_drained:
                news.wants_drained = False
                events.append(Drained())
            if events and not news.session.post(events):
                self._leave(news)

    def _report(self, *, draining: bool) -> EngineLoadReport:
        scheduler = self._engine.scheduler
        load, cache = scheduler.load, scheduler.pool.stats
        return EngineLoadReport(
            running=load.running,
            waiting=load.waiting,
            queue_room=scheduler.queue_room,
            blocks_total=load.blocks_total,
            blocks_available=load.blocks_available,
            preemptions=load.preemptions,
            prefix_hits=cache.hits,
            prefix_misses=cache.misses,
            draining=draining,
            stages=self._engine.stage_times,
        )

    def _end_all(self, failure: SlipstreamError) -> None:
        with self._lock:
            self._failure = failure
            sessions, self._sessions = list(self._sessions), {}
        self._inbox.close()
        for session in sessions:
            session.end(failure)

    def _close_engine(self) -> None:
        try:
            self._engine.close()
        except SlipstreamError:
            # Its sessions have ended; a step that fails on the way out harms nobody any more.
            logger.exception("the engine did not close well")
