"""Readiness: a token was really generated, end to end, a moment ago.

Owns the probes and for how long their answers hold. Where replicas compute prompts for others, the way to prove is
theirs: a token of one, its keys and values handed over, and the next token of the other. While that fails and a replica
still answers by itself, requests are answered: ready, and degraded. A token that went to a client proves as much as one
of a probe.
"""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from ...comm.kv.transfer import Ending
from ...sdk.errors import EngineUnavailable, SlipstreamError
from ...sdk.params import SamplingParams
from ..clock import Clock
from ..messages import EngineRequest
from ..rpc.engine_client import HandOffReport, RequestEvent, SendTo
from .replica import Replicas, ServedModel
from .routes import Ask, Route, Split, Whole

_PROBE = Ask(prompt=np.zeros(1, dtype=np.int32), max_tokens=1, may_split=False)
_SPLIT_PROBE = Ask(prompt=np.zeros(1, dtype=np.int32), max_tokens=2, must_split=True)

_TRIES = 2
"""Pairs that are tried before the way between them counts as broken."""

_SPLIT_SHARE = 0.5
"""Of a probe's time what pairs may take together: the rest is for a replica that answers by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What was found. ``problem``: why requests are not answered; ``degraded``: what fails though they are."""

    problem: str | None = None
    degraded: str | None = None


class _Way:
    """One way for a token to come: when that was seen last, of which incarnations, or why it failed.

    Units: at_s, on the gateway's clock
    """

    def __init__(self) -> None:
        self.at_s = float("-inf")
        self.epochs: tuple[str, ...] = ()
        self.problem: str | None = None

    @property
    def known(self) -> bool:
        """Whether it was ever tried."""
        return self.at_s > float("-inf")

    def worked(self, now_s: float, *epochs: str) -> None:
        """Note a token."""
        self.at_s, self.epochs, self.problem = now_s, epochs, None

    def failed(self, now_s: float, problem: str) -> None:
        """Note a probe that failed."""
        self.at_s, self.epochs, self.problem = now_s, (), problem


class Readiness:
    """Says whether an engine generates; asks one at most once in ``cache_s`` seconds, however often it is asked."""

    def __init__(self, replicas: Replicas, *, clock: Clock, cache_s: float, timeout_s: float) -> None:
        self._replicas = replicas
        self._clock = clock
        self._cache_s = cache_s
        self._timeout_s = timeout_s
        self._whole = _Way()
        self._split = _Way()
        self._probing = asyncio.Lock()

    @property
    def paths(self) -> Mapping[str, bool]:
        """Return whether each way worked when it was last tried; what was never tried is left out."""
        ways = {"whole": self._whole} | ({"split": self._split} if self._replicas.splits else {})
        return {name: way.problem is None for name, way in ways.items() if way.known}

    def saw_token(self, model: ServedModel, *, now_s: float, sender: ServedModel | None = None) -> None:
        """Note that a token came from the engine now; ``sender``: whose keys and values it was drawn from."""
        if sender is not None:
            self._split.worked(now_s, sender.facts.epoch, model.facts.epoch)
        elif model.facts.role != "prefill":
            self._whole.worked(now_s, model.facts.epoch)

    async def look(self) -> Look:
        """Look whether requests are answered, and by whom they should be."""
        if (held := self._held()) is not None:
            return held
        async with self._probing:
            # While this call waited, another one may have asked for it.
            if (held := self._held()) is not None:
                return held
            ends_s = self._clock() + self._timeout_s
            if self._replicas.splits and not self._is_fresh(self._split):
                problem = await self._try_pairs()
                if problem is not None:
                    self._split.failed(self._clock(), problem)
            if (held := self._held()) is not None:
                return held
            problem = await self._try_one(max(ends_s - self._clock(), 0.0))
            if problem is not None:
                self._whole.failed(self._clock(), problem)
                return Look(problem=problem)
            return Look(degraded=self._split.problem if self._replicas.splits else None)

    def _held(self) -> Look | None:
        """Return what was found a moment ago, None where nothing holds that says enough."""
        if not self._replicas.splits:
            return Look() if self._proves(self._whole) else None
        if self._proves(self._split):
            return Look()
        if self._is_fresh(self._split) and self._split.problem is not None and self._proves(self._whole):
            return Look(degraded=self._split.problem)
        return None

    def _is_fresh(self, way: _Way) -> bool:
        return self._clock() - way.at_s <= self._cache_s and all(map(self._replicas.has, way.epochs))

    def _proves(self, way: _Way) -> bool:
        """Whether engines that are still there have generated a token that way a moment ago."""
        return way.problem is None and self._is_fresh(way)

    # ------------------------------------------------------------------ one replica

    async def _try_one(self, timeout_s: float) -> str | None:
        """Have one replica generate a token; return why it did not."""
        try:
            current = self._replicas.current()
        except EngineUnavailable as error:
            return str(error)
        # As a request does: the next probe goes to another replica when this one hangs.
        route = self._replicas.route(_PROBE, current)
        if not isinstance(route, Whole):
            return "no replica takes requests now"
        try:
            model = self._replicas.reach(route.replica)
            async with asyncio.timeout(timeout_s):
                tokens, _ = await self._run(model, self._request(model, 1), timeout_s=timeout_s)
        except (SlipstreamError, TimeoutError) as error:
            return str(error) or f"no token came within {self._timeout_s:g} s"
        finally:
            self._replicas.ended(route)
        if tokens == 0:
            return "the engine ended a request without a token"
        self.saw_token(model, now_s=self._clock())
        return None

    # ------------------------------------------------------------------ a pair

    async def _try_pairs(self) -> str | None:
        """Have a pair generate two tokens, one each, or another pair; return why none did."""
        problem = "prompts are computed where they are decoded: no pair of replicas is there that can share them"
        exclude: frozenset[str] = frozenset()
        for _ in range(_TRIES):
            route = self._pair(exclude)
            if not isinstance(route, Split):
                break
            try:
                broken = await self._try_pair(route, self._timeout_s * _SPLIT_SHARE / _TRIES)
            finally:
                self._replicas.ended(route)
            if broken is None:
                return None
            problem = f"prompts may be computed where they are decoded: {broken}"
            exclude = frozenset((route.prefill, route.decode))
        return problem

    def _pair(self, exclude: frozenset[str]) -> Route | None:
        """Return the route of a pair without those that have just failed; one of them may have to do once more."""
        try:
            current = self._replicas.current()
        except EngineUnavailable:
            return None
        for without in (exclude, *(frozenset((name,)) for name in sorted(exclude))):
            if (route := self._replicas.route(replace(_SPLIT_PROBE, exclude=without), current)) is not None:
                return route
        return None

    async def _try_pair(self, route: Split, timeout_s: float) -> str | None:
        """Let one compute and the other go on; return what failed. What is left early is aborted at both."""
        told = f"{route.prefill} to {route.decode}"
        running: list[asyncio.Task[tuple[int, HandOffReport | None]]] = []
        try:
            sender, receiver = self._replicas.reach(route.prefill), self._replicas.reach(route.decode)
            request, ticket = self._request(receiver, 2), uuid.uuid4().hex
            name, address = self._replicas.where(route.decode)
            to = SendTo(replica=name, address=address, ticket=ticket)
            async with asyncio.timeout(timeout_s):
                holding = asyncio.create_task(self._run(receiver, request, timeout_s=timeout_s, ticket=ticket))
                running.append(holding)
                sending = asyncio.create_task(self._send(route, sender, request, timeout_s=timeout_s, to=to))
                running.append(sending)
                _, (tokens, _) = await asyncio.gather(sending, holding)
        except (SlipstreamError, TimeoutError) as error:
            return f"from {told}: {str(error) or f'no token came within {timeout_s:g} s'}"
        finally:
            for each in running:
                each.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        if tokens < 2:
            return f"from {told}: the engine ended a request without its tokens"
        self.saw_token(receiver, now_s=self._clock(), sender=sender)
        return None

    async def _send(
        self, route: Split, model: ServedModel, request: EngineRequest, *, timeout_s: float, to: SendTo
    ) -> tuple[int, HandOffReport | None]:
        """Compute and hand over. Raises: EngineUnavailable when it did not arrive"""
        try:
            tokens, report = await self._run(model, request, timeout_s=timeout_s, send_to=to)
        except SlipstreamError:
            self._replicas.note_hand_off(route, None)
            raise
        self._replicas.note_hand_off(route, report)
        if report is None or report.ending != Ending.COMMITTED:
            raise EngineUnavailable(f"the KV did not arrive: {'lost' if report is None else report.ending}")
        return tokens, report

    # ------------------------------------------------------------------ requests

    def _request(self, model: ServedModel, max_tokens: int) -> EngineRequest:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        prompt = model.factory.prepare(list(model.facts.eos_token_ids[:1] or (0,)))
        name = f"ready-{secrets.token_hex(8)}"
        return model.factory.make(name, prompt, params, arrival_time_s=self._clock(), priority=-1)

    async def _run(
        self,
        model: ServedModel,
        request: EngineRequest,
        *,
        timeout_s: float,
        send_to: SendTo | None = None,
        ticket: str = "",
    ) -> tuple[int, HandOffReport | None]:
        """Run a request to its end; return how many tokens came, and what became of its keys and values."""
        tokens, report = 0, None
        news = model.client.generate(request, timeout_s=timeout_s, send_to=send_to, ticket=ticket)
        async with aclosing(cast("AsyncGenerator[RequestEvent]", news)) as events:
            async for event in events:
                tokens += sum(len(sample.token_ids) for sample in event.samples)
                report = event.hand_off or report
        return tokens, report
