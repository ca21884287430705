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
from typing import assert_never

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
from ..handoff.desk import DeskFailed, HandOffDesk
from ..handoff.receiving import Arrived
from ..handoff.sending import SendEnded
from ..rpc.engine_client import EngineFacts, EngineLoadReport
from ..rpc.outbox import Outbox
from ..rpc.session import (
    Abort,
    AbortSample,
    Command,
    Drain,
    Drained,
    Event,
    GoOn,
    HandOffEnded,
    Load,
    Opened,
    Rejected,
    Submit,
)
from .block_news import BlockNews
from .driver_hand_off import HandOffs
from .driver_session import Compiled, DriverSession, Enter, Leave, LiveRequest, News, Post
from .grammar_gate import ConstraintCompiler, GrammarGate
from .inbox import Inbox

logger = logging.getLogger(__name__)

_STALLED_S = 0.01
"""Between looks while all that there is to do waits for blocks on loan, which come back at any time."""
_STALE_DEADLINES = 4096  # of requests that have ended, kept before they are swept out


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverLimits:
    """Bounds of everything that waits in a driver.

    - ``max_sessions``: gateways at once. ``max_commands``: submits that wait for the engine's thread.
    - ``max_unread``: numbers (tokens, log-probabilities) that a gateway may leave unread.
    - ``max_awaiting``: requests that wait for their KV.

    Units: load_period_s, seconds between load reports while no step brings them
    """

    max_sessions: int = 64
    max_commands: int = 8192
    max_unread: int = 1 << 20
    max_awaiting: int = 4096
    load_period_s: float = 1.0


class EngineLoop:
    """An engine in motion; an ``EngineHost``. Call ``start`` once, ``close`` at the end.

    ``check`` is called while there is nothing to do, and ends the engine by raising something: a rank may be lost then
    too. ``desk``: where KV goes out and comes in, begun and closed with the loop; None where it is never moved.
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
        desk: HandOffDesk | None = None,
    ) -> None:
        self._engine = engine
        self._facts = facts
        self._clock = clock
        self._limits = limits or DriverLimits()
        self._check = check
        self._inbox: Inbox[Post] = Inbox()
        self._gate = GrammarGate(compiler)
        self._desk = desk
        self._hand_offs = HandOffs(engine, desk, facts, max_awaiting=self._limits.max_awaiting)
        self._blocks = BlockNews(engine.scheduler.pool, clock=clock)
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
        if self._desk is not None:
            self._desk.begin(self._inbox.put)
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
                with self._engine.lock:
                    for post in posts:
                        self._take_in(post)
                    self._end_overdue()
                # The step takes the lock itself, for as long as it does not compute.
                outputs = self._engine.step() if self._engine.has_work else self._look_around()
                with self._engine.lock:
                    self._note(outputs)
                    self._post()
        except Exception as error:
            # Whatever it was, the engine's state is not to be trusted any more, and everybody who waits must hear it.
            logger.exception("the engine failed")
            failure = EngineUnavailable(f"the engine failed: {error}")
        finally:
            self._gate.close()
            self._end_all(failure)
            if self._desk is not None:
                self._desk.close()
            self._close_engine()

    def _patience_s(self) -> float | None:
        if self._engine.has_work:
            return _STALLED_S if self._engine.is_stalled else 0.0
        if not self._sessions:
            return None
        next_deadline_s = self._deadlines[0][0] - self._clock() if self._deadlines else self._limits.load_period_s
        return max(0.0, min(self._limits.load_period_s, next_deadline_s))

    def _look_around(self) -> StepOutputs:
        """Make sure, while there is nothing to compute, that all ranks are there."""
        self._check()
        return StepOutputs()

    def _take_in(self, post: Post) -> None:
        match post:
            case (session, command):
                self._carry_out(session, command)
            case Arrived():
                self._arrived(post)
            case SendEnded():
                self._send_ended(post)
            case DeskFailed(error=error):
                raise error
            case _:
                assert_never(post)

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
                    self._drop(live)
            case AbortSample(key=key, index=index):
                if (live := news.live.get(key)) is not None:
                    self._abort_sample(live, index)
            case GoOn(key=key):
                if (live := news.live.get(key)) is not None:
                    self._try(live, partial(self._hand_offs.go_on, live))
            case Drain():
                self._draining = news.wants_drained = True
            case Enter():
                # What the others are told goes first: this session begins with all that is there after it.
                self._tell_blocks(self._blocks.changes(now=True))
                news.others += self._blocks.all()
                news.knows_blocks = True
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

        def start() -> None:
            if compiled.error is not None:
                raise compiled.error
            self._start(live, compiled.submit)

        self._try(live, start)

    def _try(self, live: LiveRequest, act: Callable[[], object]) -> None:
        """Do something for a request that is live, which ends with the error when that fails."""
        try:
            act()
        except SlipstreamError as error:
            self._drop(live)
            live.news.others.append(Rejected(key=live.key, error=error))

    def _start(self, live: LiveRequest, submit: Submit) -> None:
        request = replace(submit.request, request_id=live.engine_id, arrival_time_s=self._clock())
        if submit.send_to is not None:
            self._hand_offs.send(live, request, submit.send_to)
        elif submit.ticket:
            self._hand_offs.hold(live, request, submit.ticket)
        else:
            self._hand_offs.begin(live, request)

    def _abort_sample(self, live: LiveRequest, index: int) -> None:
        if live.waiting is not None and index == 0:
            live.news.add_unbegun_ending(live)
            self._drop(live)
        elif index < len(live.sequences) and live.sequences[index].state is not SequenceState.FINISHED:
            self._engine.scheduler.abort_sequence(live.sequences[index])
            self._end_sample(live, live.sequences[index])

    def _arrived(self, arrived: Arrived) -> None:
        """Let a request go on with its KV, which has come."""
        live = self._hand_offs.find(arrived)
        self._try(live, partial(self._hand_offs.arrived, live, arrived)) if live else self._hand_offs.drop(arrived)

    def _send_ended(self, ended: SendEnded) -> None:
        """Tell what became of a request that was sent on; it goes no further here, with its token or without."""
        live = self._live.get(ended.request_id)
        if live is not None and self._hand_offs.is_over(live, ended):
            self._drop(live)
            live.news.others.append(HandOffEnded(key=live.key, report=ended.report))

    def _end_overdue(self) -> None:
        """End requests whose time is over, also when their gateway forgot to, or cannot."""
        while self._deadlines and self._deadlines[0][0] <= self._clock():
            deadline_s, engine_id = heapq.heappop(self._deadlines)
            live = self._live.get(engine_id)
            # A name may have come back since, with a later deadline.
            if live is not None and live.deadline_s == deadline_s:
                self._drop(live)
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
                if live.sent_on:
                    live.last = token_id, logprobs.get(place)
        for sequence in outputs.finished:
            if (live := requests.get(sequence.request.request_id)) is None:
                continue
            if not live.sent_on or not self._hand_offs.is_handed(live, sequence):
                self._end_sample(live, sequence)

    def _end_sample(self, live: LiveRequest, sequence: Sequence) -> None:
        live.news.add_ending(live, sequence)
        live.open_samples -= 1
        if not live.open_samples:
            self._forget(live)

    def _drop(self, live: LiveRequest) -> None:
        """Forget a request, whatever it is doing."""
        self._forget(live)
        self._engine.abort(live.engine_id)

    def _forget(self, live: LiveRequest) -> None:
        self._hand_offs.leave(live)
        del self._live[live.engine_id]
        del live.news.live[live.key]

    def _leave(self, news: News) -> None:
        with self._lock:
            self._sessions.pop(news.session, None)
        for live in list(news.live.values()):
            self._drop(live)

    # ------------------------------------------------------------------ news

    def _post(self) -> None:
        """Post every session what there is for it: at most one batch a step."""
        # A request that waits for its constraint is live without being work.
        load = self._report(draining=self._draining)
        moving = load.awaiting or load.sending or load.receiving
        idle, now_s = not (self._engine.has_work or self._live or moving), self._clock()
        self._tell_blocks(self._blocks.changes(now=idle) if self._sessions else [])
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

    def _tell_blocks(self, changes: list[Event]) -> None:
        """Tell every session that knows what is cached what has changed."""
        if changes:
            with self._lock:
                told = [news for news in self._sessions.values() if news.knows_blocks]
            for news in told:
                news.others += changes

    def _report(self, *, draining: bool) -> EngineLoadReport:
        scheduler = self._engine.scheduler
        load, cache, moving = scheduler.load, scheduler.pool.stats, self._hand_offs.load
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
            queued_tokens=load.queued_tokens,
            prefill_tokens_per_s=self._engine.rates.prefill_tokens_per_s,
            token_s=self._engine.rates.token_s,
            awaiting=moving.awaiting,
            sending=moving.sending,
            receiving=moving.receiving,
            kv_bytes_out=moving.kv_bytes_out,
            kv_bytes_in=moving.kv_bytes_in,
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
