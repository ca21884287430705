"""The client's end of a session, whatever carries it: gives each event to the request that it belongs to.

Owns keys, mailboxes and deadlines; the wire belongs to its subclasses, ``client`` (gRPC) and ``in_process``. One event
loop's own. On a request's way: between the gateway and the replica, out and back.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable

from ...sdk.errors import DeadlineExceeded, EngineUnavailable, InvalidRequest, Overloaded, SlipstreamError
from ..messages import EngineRequest
from .blocks_news import BlocksNews
from .engine_client import BlockChanges, EngineFacts, EngineLoadReport, RequestEvent, SendTo, TakeToken
from .mailbox import Mailbox
from .session import (
    Abort,
    AbortSample,
    BlocksChanged,
    Closed,
    Command,
    Drain,
    Drained,
    Event,
    GoOn,
    HandOffEnded,
    Load,
    Opened,
    Rejected,
    StepNews,
    Submit,
)
from .submit_rules import check_submit

DEFAULT_MAX_LIVE_REQUESTS = 16_384


class SessionClient(ABC):
    """What every ``EngineClient`` does the same way.

    ``max_live_requests``: requests on their way at once; one more is refused as Overloaded.
    """

    def __init__(self, *, max_live_requests: int = DEFAULT_MAX_LIVE_REQUESTS) -> None:
        self._max_live_requests = max_live_requests
        self._boxes: dict[int, Mailbox] = {}
        self._keys: dict[str, int] = {}
        self._next_key = 1
        self._load: EngineLoadReport | None = None
        self._blocks = BlocksNews()
        self._drained = asyncio.Event()
        self._lost = asyncio.Event()
        self._opened: asyncio.Future[Opened] | None = None
        self._failure: SlipstreamError | None = EngineUnavailable("not connected: call connect first")

    @abstractmethod
    async def _connect(self) -> EngineFacts:
        """Meet the replica and start to feed its events to ``_take``."""

    @abstractmethod
    def _send(self, command: Command) -> None:
        """Hand a command over to the replica, in order, without waiting."""

    @abstractmethod
    async def _disconnect(self) -> None:
        """Leave the replica and free what ``_connect`` took. Idempotent."""

    def _silence_hint(self) -> str:
        """Return what to add where a replica does not answer."""
        return ""

    # ------------------------------------------------------------------ the contract

    async def connect(self, *, timeout_s: float) -> EngineFacts:
        """Meet the replica; raise EngineUnavailable when it does not answer in time."""
        if self._opened is not None:
            raise EngineUnavailable("this client has been connected before: make a new one")
        self._opened = asyncio.get_running_loop().create_future()
        # Set before anything can fail it, cleared when all is well: no request is taken in between.
        try:
            async with asyncio.timeout(timeout_s):
                facts = await self._connect()
                opened = await self._opened
        except BaseException as error:
            self._fail_all(EngineUnavailable("the connection was not made"))
            await self._disconnect()
            if isinstance(error, TimeoutError):
                raise EngineUnavailable(
                    f"the replica did not answer within {timeout_s} s{self._silence_hint()}"
                ) from error
            raise
        if opened.epoch != facts.epoch:
            await self._disconnect()
            raise EngineUnavailable("the replica was started anew while it was being met")
        return facts

    async def generate(
        self,
        request: EngineRequest,
        *,
        timeout_s: float,
        take_token: TakeToken | None = None,
        send_to: SendTo | None = None,
        ticket: str = "",
        trace_id: str = "",
    ) -> AsyncGenerator[RequestEvent]:
        """Submit a request and yield its news; see ``EngineClient.generate``."""
        submit = Submit(
            key=self._next_key,
            request=request,
            timeout_s=timeout_s,
            send_to=send_to,
            ticket=ticket,
            trace_id=trace_id,
        )
        box = self._open_box(submit, take_token)
        overdue = DeadlineExceeded(f"request {request.request_id!r} did not end within {timeout_s} s")
        timer = asyncio.get_running_loop().call_later(timeout_s, self._end_box, box, overdue)
        try:
            while (event := await box.next()) is not None:
                yield event
        finally:
            timer.cancel()
            self._end_box(box, EngineUnavailable("the caller has left"))

    async def abort_sample(self, request_id: str, index: int) -> None:
        """End one sample; its last event still comes. Idempotent."""
        key = self._keys.get(request_id)
        if key is not None and self._boxes[key].is_open(index):
            self._send(AbortSample(key=key, index=index))

    async def go_on(self, request_id: str) -> None:
        """Have a request that waits for KV computed there instead. Idempotent; too late, it does nothing."""
        key = self._keys.get(request_id)
        if key is not None and (box := self._boxes[key]).awaits:
            box.awaits = False
            self._send(GoOn(key=key))

    def watch_blocks(self, told: Callable[[BlockChanges], None]) -> None:
        """Tell somebody what the replica's prefix cache holds, first all of it, then every change. Call it once."""
        self._blocks.watch(told)

    @property
    def live_requests(self) -> int:
        """How many requests have not ended."""
        return len(self._boxes)

    def load(self) -> EngineLoadReport | None:
        """Return the newest load report, None before the first."""
        return self._load

    async def drain(self, *, timeout_s: float) -> bool:
        """Ask the replica to take no more requests and wait until it has none; return whether it got there."""
        if self._failure is not None:
            raise self._failure
        self._send(Drain())
        try:
            async with asyncio.timeout(timeout_s):
                await self._drained.wait()
        except TimeoutError:
            return False
        if self._failure is not None:
            raise self._failure
        return True

    async def wait_lost(self) -> SlipstreamError:
        """Wait until the session has ended, and return why: whoever watches over a replica waits here."""
        await self._lost.wait()
        assert self._failure is not None, "a session that was lost has a failure"
        return self._failure

    async def close(self) -> None:
        """Leave the replica; requests still on their way are aborted."""
        self._fail_all(EngineUnavailable("the client was closed"))
        await self._disconnect()

    # ------------------------------------------------------------------ requests

    def _open_box(self, submit: Submit, take_token: TakeToken | None) -> Mailbox:
        request = submit.request
        check_submit(submit)
        if self._failure is not None:
            raise self._failure
        if request.request_id in self._keys:
            raise InvalidRequest("request_id", f"{request.request_id!r} is in use by a request that has not ended")
        if len(self._boxes) >= self._max_live_requests:
            raise Overloaded(f"{len(self._boxes)} requests are on their way to the replica already")
        box = Mailbox(
            submit.key,
            request,
            take_token=take_token,
            sent_on=submit.send_to is not None,
            awaits=bool(submit.ticket),
        )
        self._send(submit)
        self._next_key += 1
        self._boxes[box.key] = box
        self._keys[request.request_id] = box.key
        return box

    def _end_box(self, box: Mailbox, error: SlipstreamError) -> None:
        """Forget a request; when it has not ended, it ends with ``error`` and is aborted at the replica."""
        if self._forget(box) and self._failure is None:
            self._send(Abort(key=box.key))
        box.fail(error)

    def _forget(self, box: Mailbox) -> bool:
        if self._boxes.pop(box.key, None) is None:
            return False
        del self._keys[box.request.request_id]
        return True

    # ------------------------------------------------------------------ events

    def _take(self, event: Event) -> None:
        """Give an event to whom it belongs. What cannot be raises EngineUnavailable: the session is broken then."""
        match event:
            case StepNews():
                self._load = event.load
                self._take_news(event)
            case Load():
                self._load = event.load
            case Rejected():
                if (box := self._box(event.key)) is not None:
                    self._forget(box)
                    box.fail(event.error)
            case HandOffEnded():
                if (box := self._box(event.key)) is not None:
                    box.add_hand_off(event.report)
                    self._forget(box)
            case BlocksChanged():
                self._blocks.take(event.changes)
            case Opened():
                self._load = event.load
                if self._opened is None or self._opened.done():
                    raise EngineUnavailable("the replica opened the session twice")
                self._failure = None
                self._opened.set_result(event)
            case Drained():
                self._drained.set()
            case Closed():
                raise EngineUnavailable(f"the replica ended the session: {event.error}")

    def _take_news(self, news: StepNews) -> None:
        for key, scores in news.prompt_scores:
            if (box := self._box(key)) is not None:
                box.add_scores(scores)
        boxes, logprobs = self._boxes, news.logprobs
        for place, (key, index, token_id) in enumerate(zip(news.keys, news.indices, news.token_ids, strict=True)):
            box = boxes.get(key) or self._box(key)
            if box is not None:
                box.add_token(index, token_id, logprobs.get(place))
        for ending in news.endings:
            if (box := self._box(ending.key)) is not None:
                box.add_ending(ending)
                if not box.open_samples:
                    self._forget(box)

    def _box(self, key: int) -> Mailbox | None:
        """Return a request's mailbox, None when the request has been left: its news may still be on their way."""
        if not 0 < key < self._next_key:
            raise EngineUnavailable(f"the replica sent news of a request that was never made (key {key})")
        return self._boxes.get(key)

    def _fail_all(self, error: SlipstreamError) -> None:
        """End the session: every request that waits, and every later one, ends with ``error``."""
        if self._failure is not None and (self._opened is None or self._opened.done()):
            return
        self._failure = error
        if self._opened is not None and not self._opened.done():
            self._opened.set_exception(error)
            # connect may have been left already; the error is not lost, it is _failure.
            self._opened.exception()
        for box in list(self._boxes.values()):
            self._forget(box)
            box.fail(error)
        self._drained.set()
        self._lost.set()
