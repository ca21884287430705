"""Puts load on a server: closed loop or open loop, every request bounded in time and accounted for.

Owns when requests are sent. What comes back is written down as it comes; what it amounts to, ``statistics`` knows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from ..api_client.client import ApiClient
from ..api_client.errors import ApiError
from ..clock import Clock
from .plan import LoadPlan, calibrated_words, prompt_text
from .statistics import RequestRecord

DEADLINE = "deadline"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """The records of a load test, in the order of its prompts, and when it began and ended."""

    records: tuple[RequestRecord, ...]
    start_s: float
    end_s: float


class LoadGenerator:
    """Runs a plan against one model of one server. ``on_end`` is called with each record as its request ends."""

    def __init__(
        self, client: ApiClient, model: str, plan: LoadPlan, *, clock: Clock,
        on_end: Callable[[RequestRecord], None] | None = None,
    ) -> None:  # fmt: skip
        self._client = client
        self._model = model
        self._plan = plan
        self._clock = clock
        self._on_end = on_end
        self._words = plan.prompt_tokens

    async def calibrate(self) -> None:
        """Ask for one token, to see that the server answers and how many words of ours make the tokens wanted.

        Raises: ApiError
        """
        body = {**self._body(-1), "max_tokens": 1, "stream": False}
        del body["stream_options"]
        try:
            async with asyncio.timeout(self._plan.request_timeout_s):
                answer = await self._client.post("completions", body)
        except TimeoutError as error:
            message = f"the first answer took more than {self._plan.request_timeout_s:g} s"
            raise ApiError(DEADLINE, message) from error
        match answer.get("usage"):
            case {"prompt_tokens": int(found)}:
                self._words = calibrated_words(self._plan.prompt_tokens, tried_words=self._words, found_tokens=found)

    async def run(self, arrivals: Sequence[float] | None = None) -> LoadResult:
        """Send every request and return what became of each.

        ``arrivals`` says when each is due, in seconds after the start; without them the plan does.
        """
        due = self._plan.arrivals() if arrivals is None else arrivals
        start_s = self._clock()
        records = await (self._closed() if due is None else self._open(start_s, due))
        ordered = tuple(sorted(records, key=lambda record: record.index))
        return LoadResult(records=ordered, start_s=start_s, end_s=self._clock())

    async def _closed(self) -> list[RequestRecord]:
        records: list[RequestRecord] = []
        waiting = iter(range(self._plan.num_prompts))

        async def client() -> None:
            for index in waiting:
                records.append(await self._request(index, self._clock()))

        async with asyncio.TaskGroup() as clients:
            for _ in range(self._plan.concurrency):
                clients.create_task(client())
        return records

    async def _open(self, start_s: float, arrivals: Sequence[float]) -> list[RequestRecord]:
        records: list[RequestRecord] = []
        turns = asyncio.Semaphore(self._plan.concurrency)

        async def send(index: int, due_s: float) -> None:
            try:
                records.append(await self._request(index, due_s))
            finally:
                turns.release()

        async with asyncio.TaskGroup() as requests:
            for index, after_s in enumerate(arrivals):
                due_s = start_s + after_s
                if (wait_s := due_s - self._clock()) > 0:
                    await asyncio.sleep(wait_s)
                await turns.acquire()
                requests.create_task(send(index, due_s))
        return records

    async def _request(self, index: int, due_s: float) -> RequestRecord:
        """Send one request and follow its stream to the end; failures are part of the record."""
        pieces_s: list[float] = []
        usage: dict[str, Any] = {}
        error, detail = None, ""
        try:
            async with asyncio.timeout(self._plan.request_timeout_s):
                events = self._client.stream("completions", self._body(index))
                async with aclosing(events):
                    async for event in events:
                        if _has_text(event, first=not pieces_s):
                            pieces_s.append(self._clock())
                        usage = event.get("usage") or usage
        except TimeoutError:
            error, detail = DEADLINE, f"no whole answer within {self._plan.request_timeout_s:g} s"
        except ApiError as failure:
            error, detail = failure.kind, failure.problem
        record = RequestRecord(
            index=index,
            due_s=due_s,
            end_s=self._clock(),
            pieces_s=tuple(pieces_s),
            prompt_tokens=usage.get("prompt_tokens"),
            output_tokens=usage.get("completion_tokens"),
            error=error,
            detail=detail,
        )
        if self._on_end is not None:
            self._on_end(record)
        return record

    def _body(self, index: int) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": prompt_text(self._words, seed=self._plan.seed, index=index),
            "max_tokens": self._plan.output_tokens,
            # Not every server knows it; those that do then answer with as many tokens as were asked for.
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def _has_text(event: dict[str, Any], *, first: bool) -> bool:
    """Return whether an event brings tokens: it has text, or is the first, whose token may be half a character."""
    match event.get("choices"):
        case [{"text": str(text)}, *_]:
            return first or bool(text)
    return False
