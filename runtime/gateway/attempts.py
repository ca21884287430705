"""Carries out one request's way: submits, aborts, waits, and brings the news of all attempts in one stream.

``request.RequestWay`` decides; this asks the router, speaks with replicas and keeps time. While one replica has all of
a request, which is nearly always, its news pass through here and nothing else is done: no task, no timer. It must not
know text.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from typing import assert_never, cast

import numpy as np

from ...comm.kv.transfer import Ending
from ...sdk.errors import EngineUnavailable, SlipstreamError
from ..messages import EngineRequest, FinishReason
from ..rpc.engine_client import RequestEvent, SampleEvent, SendTo, TakeToken
from .errors import Draining
from .gateway import Gateway
from .record import RequestRecord
from .replica import ServedModel
from .request import Action, Choose, Deliver, Drop, Finished, GiveUp, GoOn, Part, RequestWay, Submit, WayLimits
from .routes import Ask, Route, Split

logger = logging.getLogger(__name__)

_LOOK_S = 0.1
"""How often one that waits for a replica looks whether the gateway is to end."""

_STALL_FACTOR = 3.0
"""A prompt that takes so many times as long as was thought has stalled."""

_LIMITS = WayLimits(stall_s=15.0)


class _Attempt:
    """One attempt at a replica. ``pending``: its next news, while somebody else's may come first."""

    __slots__ = ("events", "model", "number", "pending", "request", "route", "submit")

    def __init__(
        self,
        submit: Submit,
        route: Route,
        model: ServedModel,
        request: EngineRequest,
        events: AsyncGenerator[RequestEvent],
    ) -> None:
        self.number = submit.attempt
        self.submit = submit
        self.route = route
        self.model = model
        self.request = request
        self.events = events
        self.pending: asyncio.Task[RequestEvent | None] | None = None

    def ask(self) -> asyncio.Task[RequestEvent | None]:
        """Return the task that waits for its next news; None is its end."""
        if self.pending is None:
            self.pending = asyncio.ensure_future(self._next())
        return self.pending

    async def _next(self) -> RequestEvent | None:
        return await anext(self.events, None)

    async def close(self) -> None:
        """Leave it: what has not ended is aborted at the replica."""
        if self.pending is not None:
            self.pending.cancel()
            await asyncio.gather(self.pending, return_exceptions=True)
        await self.events.aclose()


class Attempts:
    """One request's.

    ``delivered``: the tokens that were passed on, as ``RequestWay`` reads them. ``take_token``: offered tokens as
    ``EngineClient.generate`` has it, of the one replica that has all of the request. ``sender``: whose keys and values
    the replica goes on with that has the request now, None where it has computed them itself. Units: ends_s, on the
    gateway's clock
    """

    __slots__ = (
        "_delivered", "_dropped", "_failure", "_gateway", "_going_on", "_live", "_model", "_record", "_request",
        "_routes", "_take_token", "_way", "sender",
    )  # fmt: skip

    def __init__(
        self,
        gateway: Gateway,
        model: ServedModel,
        request: EngineRequest,
        record: RequestRecord,
        *,
        delivered: list[list[int]],
        ends_s: float,
        take_token: TakeToken | None,
    ) -> None:
        self._gateway = gateway
        self._model = model
        self._request = request
        self._record = record
        self._delivered = delivered
        self._take_token = take_token
        params = request.params
        self._way = RequestWay(
            delivered,
            max_tokens=request.max_tokens,
            may_split=params.n == 1 and params.prompt_logprobs is None,
            ends_s=ends_s,
            limits=_LIMITS,
        )
        self._live: dict[int, _Attempt] = {}
        self._dropped: list[_Attempt] = []
        self._going_on: list[_Attempt] = []
        # The newest is the last; one of a sender that was replaced still counts what its receiver has.
        self._routes: list[Route] = []
        self._failure: SlipstreamError | None = None
        self.sender: ServedModel | None = None

    # ------------------------------------------------------------------ news

    async def news(self) -> AsyncGenerator[tuple[int, RequestEvent]]:
        """Run to the end; yield what attempts bring, each with its number. Raises: what ended the request."""
        try:
            self._act(self._way.begin(self._now_s()))
            while True:
                await self._settle()
                if self._failure is not None:
                    raise self._failure
                if self._way.done:
                    return
                if (one := self._alone()) is not None:
                    # Written out: this is where every event that is not a split's passes.
                    try:
                        if one.pending is not None:
                            event, one.pending = await one.pending, None
                            if event is not None:
                                yield one.number, event
                        async for event in one.events:
                            yield one.number, event
                            if one.number not in self._live:
                                break
                        else:
                            self._ended(one)
                    except SlipstreamError as error:
                        for event in self._left_out():
                            yield one.number, event
                        self._failed(one, error)
                    continue
                for one in await self._soonest():
                    if one.number not in self._live:
                        continue
                    try:
                        event, one.pending = one.ask().result(), None
                    except SlipstreamError as error:
                        one.pending = None
                        for event in self._left_out():
                            yield one.number, event
                        self._failed(one, error)
                        continue
                    if event is None:
                        self._ended(one)
                        continue
                    yield one.number, event
                    if event.hand_off is not None:
                        self._handed_off(one, event)
        finally:
            await self._close_all()

    def _alone(self) -> _Attempt | None:
        """Return the attempt that all news will come from, if there is one."""
        if len(self._live) != 1:
            return None
        (one,) = self._live.values()
        return one if self._way.leads(one.number) else None

    async def _soonest(self) -> list[_Attempt]:
        """Wait until an attempt has news, or something is due; return those with news, receivers first."""
        asked = {one.ask(): one for one in self._live.values()}
        changed = asyncio.ensure_future(self._gateway.replicas.wait_changed()) if self._way.waits else None
        try:
            timeout_s = max(self._way.wakes_s - self._now_s(), 0.0)
            if changed is not None:
                timeout_s = min(timeout_s, _LOOK_S)
            await asyncio.wait(
                [*asked, *([] if changed is None else [changed])],
                timeout=timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if changed is not None and changed.done():
                self._act(self._way.replicas_changed(self._now_s()))
        finally:
            if changed is not None:
                changed.cancel()
        if self._way.waits and self._gateway.admission.draining:
            raise Draining("the server stopped before the request was done")
        self._act(self._way.due(self._now_s()))
        return [one for task, one in asked.items() if task.done()]

    # ------------------------------------------------------------------ what the reader says of it

    def taken(self, number: int, event: SampleEvent) -> int | None:
        """Return how many of a sample's first tokens have been delivered before, None when none of it is wanted."""
        if self._way.leads(number):
            return 0
        actions = self._way.take(number, event.index, event.token_ids, now_s=self._now_s())
        skips = [action.skip for action in actions if isinstance(action, Deliver)]
        self._act([action for action in actions if not isinstance(action, Deliver)])
        return skips[0] if skips else None

    def over(self, number: int, index: int) -> None:
        """Take that a sample has ended, all of whose tokens have been delivered."""
        received = (one := self._live.get(number)) is not None and one.submit.part is Part.HOLD
        actions = self._way.over(number, index)
        if received:
            self._hear_out(actions)
        self._act(actions)

    def given_up(self, number: int) -> None:
        """Take that a replica gave the request up."""
        if (one := self._live.get(number)) is not None:
            self._failed(one, EngineUnavailable("the engine gave the request up: it is stopping"))

    async def abort_sample(self, number: int, index: int) -> None:
        """End one sample at the replica."""
        if (one := self._live.get(number)) is not None:
            await one.model.client.abort_sample(one.request.request_id, index)

    def model(self, number: int) -> ServedModel | None:
        """Return the engine of an attempt, None of one that has been left."""
        one = self._live.get(number)
        return None if one is None else one.model

    # ------------------------------------------------------------------ what attempts come to

    def _left_out(self) -> Iterator[RequestEvent]:
        """Return the ends of samples whose last token came, and whose end was lost on its way."""
        request = self._request
        for index, tokens in enumerate(self._delivered):
            if not tokens:
                continue
            stopped = tokens[-1] in request.stop_ids
            if stopped or len(tokens) >= request.max_tokens:
                end = SampleEvent(
                    index=index,
                    token_ids=(),
                    finish_reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
                    stop_token_id=tokens[-1] if stopped else None,
                )
                yield RequestEvent(request_id=request.request_id, samples=(end,))

    def _ended(self, one: _Attempt) -> None:
        self._act(self._way.ended(one.number, now_s=self._now_s()))
        self._drop(one.number)

    def _failed(self, one: _Attempt, error: SlipstreamError) -> None:
        if one.submit.part is Part.SEND:
            self._note_hand_off(one, None)
        self._act(self._way.failed(one.number, error, now_s=self._now_s()))
        self._drop(one.number)

    def _handed_off(self, one: _Attempt, event: RequestEvent) -> None:
        assert event.hand_off is not None, "asked of events that have one"
        if event.hand_off.ending == Ending.COMMITTED:
            self.sender = one.model
        self._note_hand_off(one, event)
        self._act(self._way.handed_off(one.number, event.hand_off.ending, now_s=self._now_s()))
        self._drop(one.number)

    def _hear_out(self, actions: list[Action]) -> None:
        """Hear how the KV was moved of a request that its receiver has answered: nothing is left to abort there."""
        for action in actions:
            one = self._live.get(action.attempt) if isinstance(action, Drop) else None
            if one is not None and one.submit.part is Part.SEND and not self._gateway.afterwards.full:
                del self._live[one.number]
                self._gateway.afterwards.begin(self._how_it_ended(one))

    async def _how_it_ended(self, one: _Attempt) -> None:
        try:
            while (event := await one.ask()) is not None:
                one.pending = None
                if event.hand_off is not None:
                    self._note_hand_off(one, event)
                    return
        except SlipstreamError as error:
            logger.info("it is not known how KV was moved: %s", error, extra={"request_id": self._record.request_id})
        finally:
            await one.close()

    def _note_hand_off(self, one: _Attempt, event: RequestEvent | None) -> None:
        assert isinstance(one.route, Split), "only what was split is handed off"
        report = None if event is None else event.hand_off
        self._gateway.metrics.hand_offs.add(report)
        self._gateway.replicas.note_hand_off(one.route, report)

    # ------------------------------------------------------------------ actions

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Choose():
                    self._choose(action)
                case Submit():
                    self._submit(action)
                case Drop(attempt=number):
                    self._drop(number)
                case GoOn(attempt=number):
                    self._go_on(number)
                case GiveUp(error=error):
                    self._failure = error
                case Finished() | Deliver():
                    pass
                case _:
                    assert_never(action)

    def _choose(self, choose: Choose) -> None:
        replicas, request, generated = self._gateway.replicas, self._request, self._delivered[0]
        self.sender = None
        if choose.decode is None:
            self._end_routes()
        known = request.prompt_token_ids
        if generated and request.params.n == 1:
            known = np.concatenate((known, np.array(generated, dtype=np.int32)))
        given = len(known) - len(request.prompt_token_ids)
        route = replicas.route(
            Ask(
                prompt=known,
                max_tokens=request.max_tokens - given,
                generated=given,
                sequences=request.params.n,
                cache_salt=request.cache_salt,
                may_split=choose.may_split,
                exclude=choose.exclude,
                decode=choose.decode or "",
            ),
            self._model,
        )
        if route is not None:
            self._routes.append(route)
            if choose.decode is not None and isinstance(route, Split):
                self._gateway.metrics.resent.inc()
        stall_s = None
        if isinstance(route, Split):
            cost = route.cost
            stall_s = _LIMITS.stall_s + _STALL_FACTOR * (cost.queue_s + cost.compute_s + cost.transfer_s)
        self._act(self._way.routed(route, ticket=uuid.uuid4().hex, now_s=self._now_s(), stall_s=stall_s))

    def _submit(self, submit: Submit) -> None:
        """Open an attempt; it is sent when its first news are waited for."""
        replicas = self._gateway.replicas
        model = replicas.reach(submit.replica)
        if submit.attempt > 1 and submit.part is not Part.SEND:
            self._gateway.metrics.moved.inc()
        request = self._request
        if submit.generated:
            generated = tuple(
                None if tokens is None else np.array(tokens, dtype=np.int32) for tokens in submit.generated
            )
            request = replace(request, generated=generated)
        if submit.attempt > 1:
            # A replica that has not noticed yet that it lost an attempt must not take the next one for it.
            request = replace(request, request_id=f"{request.request_id}.{submit.attempt}")
        send_to = None
        if submit.part is Part.SEND:
            name, address = replicas.where(submit.decode)
            send_to = SendTo(replica=name, address=address, ticket=submit.ticket)
        events = model.client.generate(
            request,
            timeout_s=max(self._way.ends_s - self._now_s(), 0.001),
            take_token=None if submit.part is Part.SEND or self._take_token is None else self._offer(submit.attempt),
            send_to=send_to,
            ticket=submit.ticket if submit.part is Part.HOLD else "",
            trace_id=self._record.trace_id,
        )
        # An async generator, as every client's generate is: it can be left.
        news = cast("AsyncGenerator[RequestEvent]", events)
        self._live[submit.attempt] = _Attempt(submit, self._routes[-1], model, request, news)

    def _offer(self, number: int) -> TakeToken:
        """Return what takes tokens of an attempt while all of the request is its own."""
        take_token = self._take_token
        assert take_token is not None, "asked only where there is one"
        live, way = self._live, self._way

        def offer(index: int, token_id: int) -> bool:
            # While two bring news, a token that went past the reader could overtake another.
            return len(live) == 1 and way.leads(number) and take_token(index, token_id)

        return offer

    def _go_on(self, number: int) -> None:
        one = self._live[number]
        self._gateway.metrics.gone_on.inc()
        self.sender = None
        self._going_on.append(one)

    def _drop(self, number: int) -> None:
        if (one := self._live.pop(number, None)) is not None:
            self._dropped.append(one)

    async def _settle(self) -> None:
        """Do what was decided and cannot be done at once."""
        while self._dropped:
            await self._dropped.pop().close()
        while self._going_on:
            one = self._going_on.pop()
            await one.model.client.go_on(one.request.request_id)

    async def _close_all(self) -> None:
        self._way.leave()
        self._end_routes()
        for number in list(self._live):
            self._drop(number)
        await self._settle()
        # It is its owner's: the two must not keep one another for the garbage collector.
        self._take_token = None

    def _end_routes(self) -> None:
        while self._routes:
            self._gateway.replicas.ended(self._routes.pop())

    def _now_s(self) -> float:
        return self._gateway.clock()
