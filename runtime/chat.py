"""``slipstream chat``: a small chat in the terminal, over OpenAI's HTTP API.

Owns the conversation so far. Ctrl-C stops an answer, which stays in the conversation as far as it came; at the prompt
it ends the chat, as /exit and the end of input do. /reset forgets the conversation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .api_client.client import ApiClient, read_api_key
from .api_client.errors import ApiError
from .ending import run_ending_on_signals

ReadLine = Callable[[], str | None]
"""Returns what a person typed, None at the end."""

Show = Callable[[str], None]
"""Prints a text as it is, without a line end."""


_MEET_TIMEOUT_S = 30.0


@dataclass(slots=True, kw_only=True)
class Conversation:
    """What has been said so far, to one model."""

    client: ApiClient
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    async def say(self, text: str, show: Show) -> None:
        """Say something and show the answer as it comes.

        When it is cancelled or fails, the answer stays as far as it came; without any, nothing was said.
        Raises: ApiError
        """
        said = {"role": "user", "content": text}
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        body = {**self.options, "model": self.model, "messages": [*system, *self.messages, said], "stream": True}
        parts: list[str] = []
        try:
            async with aclosing(self.client.stream("chat/completions", body)) as events:
                async for event in events:
                    if part := _text_of(event):
                        parts.append(part)
                        show(part)
        finally:
            if parts:
                self.messages += [said, {"role": "assistant", "content": "".join(parts)}]


def run_chat(
    base_url: str, *, model: str | None, api_key_file: Path | None, system: str | None, options: dict[str, Any],
    read: ReadLine, show: Show,
) -> None:  # fmt: skip
    """Chat until the person has enough.

    Raises: ApiError when the server does not answer at the start; ConfigError
    """
    key = None if api_key_file is None else read_api_key(api_key_file)
    # The runner turns Ctrl-C into the cancellation of what it runs: one answer, not the chat.
    with asyncio.Runner() as runner:
        client = ApiClient(base_url, api_key=key)
        try:
            chosen = model or run_ending_on_signals(runner, _first_model(client))
            show(f"{chosen} at {client.url}. /reset starts anew, /exit ends, Ctrl-C stops an answer.\n")
            conversation = Conversation(client=client, model=chosen, options=options, system=system)
            while (text := read()) is not None and text.strip() != "/exit":
                if text.strip() == "/reset":
                    conversation.messages.clear()
                    show("The conversation is forgotten.\n")
                elif text.strip():
                    _answer(runner, conversation, text, show)
        finally:
            runner.run(client.close())


async def _first_model(client: ApiClient) -> str:
    """Return the first model that the server offers. Raises: ApiError, with what to do when nobody answers."""
    try:
        async with asyncio.timeout(_MEET_TIMEOUT_S):
            return await client.first_model()
    except TimeoutError as error:
        raise ApiError("deadline", f"{client.url} did not say what it serves within {_MEET_TIMEOUT_S:g} s") from error
    except ApiError as error:
        if error.kind != "no connection":
            raise
        hint = "no server runs there; `slipstream chat MODEL` starts one, `slipstream serve MODEL` one that stays"
        raise ApiError(error.kind, f"{error.problem} ({hint})") from error


def _answer(runner: asyncio.Runner, conversation: Conversation, text: str, show: Show) -> None:
    """Show one answer; a failure is shown and the chat goes on."""
    try:
        run_ending_on_signals(runner, conversation.say(text, show))
        show("\n")
    except KeyboardInterrupt:
        show("\n(stopped)\n")
    except ApiError as error:
        show(f"\nerror: {error}\n")


def _text_of(event: dict[str, Any]) -> str:
    match event.get("choices"):
        case [{"delta": {"content": str(text)}}, *_]:
            return text
    return ""
