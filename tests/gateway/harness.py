"""A gateway around a scripted engine, and a client that talks to it within the process."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import FastAPI

from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.gateway.app import create_app
from slipstream.runtime.gateway.gateway import Gateway, make_gateway
from slipstream.runtime.gateway.replica import Replica, model_text
from slipstream.runtime.gateway.settings import GatewaySettings
from slipstream.runtime.models.generation_defaults import GenerationDefaults
from slipstream.runtime.text.chat_template import ChatTemplate
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.tests.fakes.scripted_engine import ScriptedEngine
from slipstream.tests.text.tiny_tokenizers import byte_level

PATIENCE_S = 30.0


def asynchronous(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a test on an event loop of its own, and not for ever."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(PATIENCE_S):
                await test(*args, **kwargs)

        asyncio.run(bounded())

    return run


async def until(condition: Callable[[], bool]) -> None:
    """Let others run until a condition holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0)


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> Tokenizer:
    template = ChatTemplate({"default": TEMPLATE}, file="test", variables={})
    special = {"eos_token": "<|im_end|>", "bos_token": "<s>"}
    return Tokenizer(byte_level(), special_tokens=special, chat_template=template)


@dataclass
class Setup:
    """One gateway under test."""

    gateway: Gateway
    replica: Replica
    engine: ScriptedEngine
    tokenizer: Tokenizer
    app: FastAPI
    client: httpx.AsyncClient

    def say(self, text: str, *, end: bool = True) -> list[int]:
        """Let the engine answer with a text, whatever it is asked, and its end token."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        self.engine.script = [*ids, *self.engine.facts.eos_token_ids] if end else ids
        return ids

    async def post(self, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        return await self.client.post(path, json=body, headers=headers)

    async def completion(self, **body: Any) -> dict[str, Any]:
        answer = await self.post("/v1/completions", body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def chat(self, **body: Any) -> dict[str, Any]:
        body.setdefault("messages", [{"role": "user", "content": "hi"}])
        answer = await self.post("/v1/chat/completions", body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """Return a stream's events; the last one must be [DONE], which is left out."""
        answer = await self.post(path, {**body, "stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = parse_events(answer.text)
        assert events[-1] == "[DONE]", events
        return [json.loads(event) for event in events[:-1]]


def parse_events(text: str) -> list[str]:
    assert text.endswith("\n\n")
    blocks = text[:-2].split("\n\n")
    assert all(block.startswith("data: ") for block in blocks), text
    return [block.removeprefix("data: ") for block in blocks]


@asynccontextmanager
async def serving(
    *, defaults: GenerationDefaults | None = None, attached: bool = True, **settings: Any
) -> AsyncIterator[Setup]:
    tokenizer = make_tokenizer()
    engine = ScriptedEngine(
        vocab_size=tokenizer.vocab_size, eos_token_ids=(tokenizer.eos_token_id or 0,), max_model_len=1024
    )
    replica = Replica(model_text(tokenizer, defaults or GenerationDefaults()))
    settings.setdefault("served_model_names", ("tiny", "alias"))
    gateway = make_gateway(
        GatewaySettings(**settings), replica, clock=monotonic_clock, wall_clock=lambda: 1_700_000_000.5
    )
    if attached:
        replica.attach(engine, engine.facts)
    app = create_app(gateway)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield Setup(gateway, replica, engine, tokenizer, app, client)
