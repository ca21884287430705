"""Readiness: a token was really generated, end to end, a moment ago.

Owns the probe and for how long its answer holds. A token that went to a client proves as much as one of the probe.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import cast

import numpy as np

from ...sdk.errors import EngineUnavailable, SlipstreamError
from ...sdk.params import SamplingParams
from ..clock import Clock
from ..rpc.engine_client import RequestEvent
from .replica import Replicas, ServedModel
from .routes import Ask, Whole

_PROBE = Ask(prompt=np.zeros(1, dtype=np.int32), max_tokens=1, may_split=False)


class Readiness:
    """Says whether an engine generates; asks one at most once in ``cache_s`` seconds, however often it is asked."""

    def __init__(self, replicas: Replicas, *, clock: Clock, cache_s: float, timeout_s: float) -> None:
        self._replicas = replicas
        self._clock = clock
        self._cache_s = cache_s
        self._timeout_s = timeout_s
        self._proven_s: float | None = None
        self._proven_epoch: str | None = None
        self._probing = asyncio.Lock()

    def saw_token(self, model: ServedModel, *, now_s: float) -> None:
        """Note that a token came from the engine now."""
        self._proven_s = now_s
        self._proven_epoch = model.facts.epoch

    async def problem(self) -> str | None:
        """Return None when ready, or what stands in the way."""
        if self._holds():
            return None
        async with self._probing:
            # While this call waited, another one may have asked for it.
            if self._holds():
                return None
            try:
                current = self._replicas.current()
            except EngineUnavailable as error:
                return str(error)
            # As a request does: the next probe goes to another replica when this one hangs.
            route = self._replicas.route(_PROBE, current)
            if not isinstance(route, Whole):
                return "no replica takes requests now"
            try:
                return await self._probe(self._replicas.reach(route.replica))
            finally:
                self._replicas.ended(route)

    def _holds(self) -> bool:
        """Whether an engine that is still there has generated a token a moment ago."""
        if self._proven_s is None or self._clock() - self._proven_s > self._cache_s:
            return False
        return self._proven_epoch is not None and self._replicas.has(self._proven_epoch)

    async def _probe(self, model: ServedModel) -> str | None:
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
        token_ids = model.facts.eos_token_ids[:1] or (0,)
        prompt = model.factory.prepare(list(token_ids))
        request = model.factory.make(
            f"ready-{secrets.token_hex(8)}", prompt, params, arrival_time_s=self._clock(), priority=-1
        )
        events = cast("AsyncGenerator[RequestEvent]", model.client.generate(request, timeout_s=self._timeout_s))
        tokens = 0
        try:
            async with asyncio.timeout(self._timeout_s), aclosing(events):
                async for event in events:
                    tokens += sum(len(sample.token_ids) for sample in event.samples)
        except (SlipstreamError, TimeoutError) as error:
            return str(error) or f"no token came within {self._timeout_s:g} s"
        if tokens == 0:
            return "the engine ended a request without a token"
        self.saw_token(model, now_s=self._clock())
        return None
