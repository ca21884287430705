"""Many requests of one caller on one stream: each has a task, and all have one message for what came since the last.

Owns keys, the bound on what waits to be written, and the end: when the stream is over, however it ends, its requests
are. Nearly all that comes is text, which is written here without waking its request's task. One event loop's own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace

from ...sdk.errors import EngineUnavailable, InvalidRequest
from .codec_inference import BadAsk, decode_session_command, failure_of, reply_of
from .generated import inference_pb2 as pb
from .inference import AnswerNews, Ask, Caller, InferenceHost, InferenceRefused

logger = logging.getLogger(__name__)

MAX_REQUESTS = 16_384
MAX_UNSENT = 1 << 16

_REPLY_WEIGHT = 4
_TEXT_CHARS = 32  # so many characters weigh as much as one entry


class InferenceSession:
    """One stream's.

    ``max_unsent``: texts and replies that may wait; requests wait themselves then, and what comes for them is put
    together. Units: write_timeout_s, how long the caller may leave a message unread
    """

    def __init__(
        self,
        host: InferenceHost,
        caller: Caller,
        *,
        write: Callable[[bytes], Awaitable[None]],
        write_timeout_s: float,
        max_requests: int = MAX_REQUESTS,
        max_unsent: int = MAX_UNSENT,
    ) -> None:
        self._host = host
        self._caller = caller
        self._write = write
        self._write_timeout_s = write_timeout_s
        self._max_requests = max_requests
        self._max_unsent = max_unsent
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._last_key = 0
        self._over = False
        self._unsent = pb.SessionNews()
        self._keys: list[int] = []
        self._samples: list[int] = []
        self._texts: list[str] = []
        self._weight = 0
        self._something = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    @property
    def keeps_up(self) -> bool:
        """Whether there is room for more."""
        return self._weight < self._max_unsent

    async def take(self, data: bytes) -> None:
        """Take a command, when there is room for what it may bring. Raises: InvalidRequest, which ends the session"""
        await self._room.wait()
        try:
            key, ask, timeout_s = decode_session_command(data)
        except BadAsk as error:
            self._begin(error.key)
            self._fail(error.key, InferenceRefused(400, str(error), param=error.field))
            return
        if ask is None:
            if (task := self._tasks.get(key)) is not None:
                task.cancel()
            return
        self._begin(key)
        if len(self._tasks) >= self._max_requests:
            full = f"{len(self._tasks)} requests of this session are on their way already"
            self._fail(key, InferenceRefused(429, full, retry_after_s=1.0))
            return
        running = self._run(key, ask, replace(self._caller, timeout_s=timeout_s))
        task = asyncio.create_task(running, name=f"request {key} of a session")
        self._tasks[key] = task
        task.add_done_callback(lambda done: self._ended(key, done))

    async def write_all(self) -> None:
        """Write what comes until the session is over and nothing is left. Raises: EngineUnavailable"""
        while True:
            await self._something.wait()
            self._something.clear()
            if self._weight:
                data = self._take_unsent()
                try:
                    async with asyncio.timeout(self._write_timeout_s):
                        await self._write(data)
                except TimeoutError as error:
                    problem = f"a message was left unread for {self._write_timeout_s:g} s"
                    raise EngineUnavailable(problem) from error
            if self._over and not self._tasks and not self._weight:
                return

    def finish(self) -> None:
        """Take no more commands; what runs may end."""
        self._over = True
        self._something.set()

    async def close(self) -> None:
        """End all requests and wait for it."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def add_text(self, key: int, sample: int, text: str) -> None:
        """Add a sample's next text to the next message."""
        self._keys.append(key)
        self._samples.append(sample)
        self._texts.append(text)
        self._grow(1 + len(text) // _TEXT_CHARS)

    # ------------------------------------------------------------------ requests

    def _begin(self, key: int) -> None:
        if key <= self._last_key:
            raise InvalidRequest("key", f"{key} is not above {self._last_key}, the last one: count up")
        self._last_key = key

    async def _run(self, key: int, ask: Ask, caller: Caller) -> None:
        try:
            async with aclosing(self._host.generate(ask, caller, _Line(self, key))) as answer:
                async for news in answer:
                    self._add(key, news)
                    if not self.keeps_up:
                        await self._room.wait()
        except InferenceRefused as error:
            self._fail(key, error)

    def _ended(self, key: int, task: asyncio.Task[None]) -> None:
        del self._tasks[key]
        if not task.cancelled() and (error := task.exception()) is not None:
            # The host tells of its own faults as refusals; this one is the session's.
            logger.error("request failed", exc_info=error)
            self._fail(key, InferenceRefused(500, f"internal error: {type(error).__name__}"))
        self._something.set()

    def _add(self, key: int, news: AnswerNews) -> None:
        if news.is_text_alone:
            self.add_text(key, news.sample, news.text)
            return
        self._unsent.replies.append(pb.SessionReply(key=key, after=len(self._keys), reply=reply_of(news)))
        self._grow(_REPLY_WEIGHT + len(news.text) // _TEXT_CHARS + sum(map(len, news.logprobs)))

    def _fail(self, key: int, error: InferenceRefused) -> None:
        self._unsent.failures.append(failure_of(key, error))
        self._grow(_REPLY_WEIGHT)

    def _grow(self, weight: int) -> None:
        self._weight += weight
        if self._weight >= self._max_unsent:
            self._room.clear()
        self._something.set()

    def _take_unsent(self) -> bytes:
        message, self._unsent = self._unsent, pb.SessionNews()
        message.keys.extend(self._keys)
        message.samples.extend(self._samples)
        message.texts.extend(self._texts)
        self._keys, self._samples, self._texts = [], [], []
        self._weight = 0
        self._room.set()
        return message.SerializeToString()


class _Line:
    """A ``TextLine`` of one request."""

    __slots__ = ("_key", "_session")

    def __init__(self, session: InferenceSession, key: int) -> None:
        self._session = session
        self._key = key

    @property
    def keeps_up(self) -> bool:
        """Whether there is room for more."""
        return self._session.keeps_up

    def write(self, sample: int, text: str) -> None:
        """Write a sample's next text."""
        self._session.add_text(self._key, sample, text)
