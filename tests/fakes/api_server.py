"""A server with OpenAI's completions, written on bare sockets so that a test decides every byte and every moment."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

Answer = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def text(piece: str) -> bytes:
    return event({"choices": [{"text": piece}]})


def end(*, prompt_tokens: int, output_tokens: int) -> bytes:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": output_tokens}
    return event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n"


def whole(status: int, value: Any) -> bytes:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    head = f"HTTP/1.1 {status} -\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n"
    return head.encode() + content


class ApiServer:
    """Answers streams with ``answer`` and the rest by itself; notes what it was asked and how many at once."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.at_once = 0
        self.most_at_once = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection: one request. It is closed also when the loop ends in the middle of it."""
        try:
            await self._serve(reader, writer)
        finally:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        self.keys.append(headers.get("authorization", ""))
        if lines[0].startswith("GET"):
            writer.write(whole(200, {"data": [{"id": "first"}, {"id": "second"}]}))
        else:
            body = json.loads(content)
            if body["stream"]:
                self.bodies.append(body)
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
                try:
                    await self._answer(body, writer)
                finally:
                    self.at_once -= 1
            else:
                words = len(body["prompt"].split())
                writer.write(whole(200, {"usage": {"prompt_tokens": 2 * words, "completion_tokens": 1}}))


@asynccontextmanager
async def api_server(answer: Answer) -> AsyncGenerator[ApiServer]:
    """Run a server on this event loop."""
    server = ApiServer(answer)
    listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    async with listening:
        yield server
