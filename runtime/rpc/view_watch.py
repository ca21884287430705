"""Views over gRPC, as a gateway follows them: reconnects by itself, to whichever server answers.

Owns the deadlines, and that epochs never go back: what another server, or one that has lost its memory, says of an
earlier one is left. While nobody answers, the last view holds. It must not know what views are used for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import grpc

from ...sdk.errors import ConfigError, InvalidRequest, SlipstreamError
from ..clock import Clock
from ..reconcile.views import View
from .backoff import Backoff, Jitter
from .codec_views import decode_view, encode_watch
from .door import visit
from .errors import SecretRefused, WatchLost
from .tls import Tls, open_channel
from .wire import CLUSTER_SERVICE, WATCH, WATCH_OPTIONS, is_socket, target_of

logger = logging.getLogger(__name__)


class ViewWatch:
    """The ``ViewSource`` of the servers at ``addresses``, tried in turn.

    ``jitter`` spreads gateways that lost the same server. Units: answer_timeout_s, until a server lets us in;
    silence_s, how long one that watches hears nothing before it tries another
    Raises: ConfigError naming ``watch``
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        clock: Clock,
        jitter: Jitter,
        secret: bytes | None = None,
        tls: Tls | None = None,
        answer_timeout_s: float = 5.0,
        silence_s: float = 16.0,
        first_pause_s: float = 0.2,
        longest_pause_s: float = 5.0,
    ) -> None:
        if not addresses:
            raise ConfigError("watch", "give at least one address at which views are published")
        self._targets = [target_of(address) for address in addresses]
        self._clock = clock
        self._secret = secret
        self._tls = tls
        self._answer_timeout_s = answer_timeout_s
        self._silence_s = silence_s
        self._backoff = Backoff(
            first_s=first_pause_s, longest_s=longest_pause_s, stable_after_s=silence_s, jitter=jitter
        )
        self._epoch = 0
        self._problem = "no view has come yet"

    @property
    def problem(self) -> str:
        """Why nothing is heard at the moment, "" while something is."""
        return self._problem

    async def views(self) -> AsyncGenerator[View]:
        """Yield the newest view and each newer one, whoever publishes it."""
        tries = 0
        while True:
            target = self._targets[tries % len(self._targets)]
            began_s = self._clock()
            try:
                async with aclosing(self._watch(target)) as stream:
                    async for view in stream:
                        yield view
            except SlipstreamError as error:
                self._note(f"{target}: {error}")
            tries += 1
            # Others may answer: a pause is made once all have been asked.
            if tries % len(self._targets) == 0:
                await asyncio.sleep(self._backoff.pause_s(lasted_s=self._clock() - began_s))

    async def _watch(self, target: str) -> AsyncGenerator[View]:
        """Yield what is new from one server until it is lost. Raises: WatchLost; SecretRefused"""
        async with open_channel(target, WATCH_OPTIONS, self._tls) as channel:
            call = await self._open(channel, None if is_socket(target) else self._secret)
            try:
                while True:
                    view = await self._read(call)
                    behind = f"{target} publishes epoch {view.epoch}, and {self._epoch} is known already"
                    # The newest view comes again and again, so whoever has no news is heard all the same.
                    self._note(behind if view.epoch < self._epoch else "")
                    if view.epoch > self._epoch:
                        self._epoch = view.epoch
                        yield view
            finally:
                call.cancel()

    async def _open(self, channel: grpc.aio.Channel, secret: bytes | None) -> Any:
        watch: Any = channel.unary_stream(f"/{CLUSTER_SERVICE}/{WATCH}")
        try:
            async with asyncio.timeout(self._answer_timeout_s):
                visiting = await visit(channel, secret, wait_for_ready=False)
                call = watch(encode_watch(self._epoch), metadata=visiting.metadata(WATCH))
                await visiting.check(call, WATCH)
                # Comes at once from a server that lets us in, whether it has news or not.
                await call.initial_metadata()
        except TimeoutError as error:
            raise WatchLost(f"did not answer within {self._answer_timeout_s:g} s") from error
        except grpc.aio.AioRpcError as error:
            raise _lost(error) from error
        return call

    async def _read(self, call: Any) -> View:
        try:
            async with asyncio.timeout(self._silence_s):
                data = await call.read()
            if data is grpc.aio.EOF:
                raise WatchLost("the server ended the watch")
            return decode_view(data)
        except TimeoutError as error:
            raise WatchLost(f"nothing was heard for {self._silence_s:g} s") from error
        except grpc.aio.AioRpcError as error:
            raise _lost(error) from error
        except InvalidRequest as error:
            raise WatchLost(f"what came is no view: {error}") from error

    def _note(self, problem: str) -> None:
        """Keep what stands in the way, and say it once."""
        if problem == self._problem:
            return
        self._problem = problem
        if problem:
            logger.warning("views are not heard, the last one holds: %s", problem)
        else:
            logger.info("views are heard")


def _lost(error: grpc.aio.AioRpcError) -> SlipstreamError:
    if error.code() is grpc.StatusCode.UNAUTHENTICATED:
        return SecretRefused(f"does not let us in: {error.details()}")
    return WatchLost(f"{error.code().name}, {error.details()}")
