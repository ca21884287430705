"""Several prompts to one server at once, streamed: whoever serves them, and however they are shown."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from ..api_client.client import ApiClient
from ..api_client.errors import ApiError
from ..clock import Clock
from ..load_test.statistics import RequestRecord

Show = Callable[[int, str, bool], None]
"""Gets a prompt's index, what its answer has gained, and whether that was the last of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of one prompt."""

    record: RequestRecord
    finish_reason: str | None


async def ask_together(
    client: ApiClient, prompts: Sequence[str], body: dict[str, Any], *, show: Show, clock: Clock, timeout_s: float
) -> list[Answer]:
    """Send every prompt at once as a streaming completion with the fields of ``body``; failures are in the records."""
    async with asyncio.TaskGroup() as tasks:
        asked = [
            tasks.create_task(_ask(client, index, {**body, "prompt": prompt}, show, clock, timeout_s))
            for index, prompt in enumerate(prompts)
        ]
    return [task.result() for task in asked]


async def _ask(
    client: ApiClient, index: int, body: dict[str, Any], show: Show, clock: Clock, timeout_s: float
) -> Answer:
    due_s = clock()
    pieces_s: list[float] = []
    usage: dict[str, Any] = {}
    reason: str | None = None
    error, detail = None, ""
    streaming = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with asyncio.timeout(timeout_s), aclosing(client.stream("completions", streaming)) as events:
            async for event in events:
                usage = event.get("usage") or usage
                match event.get("choices"):
                    case [{"text": str(text), "finish_reason": str() | None as ended}, *_]:
                        # The first event brings a token even when that is only half a character.
                        if text or not pieces_s:
                            pieces_s.append(clock())
                        reason = ended or reason
                        show(index, text, reason is not None)
    except TimeoutError:
        error, detail = "deadline", f"no whole answer within {timeout_s:g} s"
    except ApiError as failure:
        error, detail = failure.kind, failure.problem
    record = RequestRecord(
        index=index,
        due_s=due_s,
        end_s=clock(),
        pieces_s=tuple(pieces_s),
        prompt_tokens=usage.get("prompt_tokens"),
        output_tokens=usage.get("completion_tokens"),
        error=error,
        detail=detail,
    )
    return Answer(record=record, finish_reason=reason)
