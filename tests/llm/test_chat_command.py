"""``slipstream chat`` before a server of which every byte is known."""

from __future__ import annotations

import asyncio
from typing import Any

from slipstream.runtime.api_client.client import ApiClient
from slipstream.runtime.chat import Conversation, run_chat
from slipstream.tests.fakes.api_server import HEAD, Answer, api_server, event, whole


def part(text: str) -> bytes:
    return event({"choices": [{"delta": {"content": text}}]})


async def answer_in_parts(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    if body["messages"][-1]["content"] == "fail":
        writer.write(whole(400, {"error": {"message": "too long"}}))
        return
    first = event({"choices": [{"delta": {"role": "assistant"}}]})
    writer.write(HEAD + first + part("Hel") + part("lo") + event({"choices": []}) + b"data: [DONE]\n\n")


def chat(answer: Answer, lines: list[str]) -> tuple[str, list[dict[str, Any]]]:
    """Type lines; return what was shown and what the server was asked."""
    shown: list[str] = []
    typed = iter(lines)

    async def run() -> list[dict[str, Any]]:
        async with api_server(answer) as server:
            await asyncio.to_thread(
                run_chat, server.url, model=None, api_key_file=None, system="Be brief.", options={"max_tokens": 5},
                read=lambda: next(typed, None), show=shown.append,
            )  # fmt: skip
            return server.bodies

    bodies = asyncio.run(run())
    return "".join(shown), bodies


def said(body: dict[str, Any]) -> list[str]:
    return [message["content"] for message in body["messages"]]


def test_a_chat_keeps_its_history_until_it_is_reset() -> None:
    shown, bodies = chat(answer_in_parts, ["one", "  ", "two", "/reset", "three", "/exit", "never"])
    assert [said(body) for body in bodies] == [
        ["Be brief.", "one"],
        ["Be brief.", "one", "Hello", "two"],
        ["Be brief.", "three"],
    ]
    assert all(body["max_tokens"] == 5 and body["model"] == "first" for body in bodies)
    assert shown.count("Hello\n") == 3


def test_a_failed_answer_is_shown_and_forgotten() -> None:
    shown, bodies = chat(answer_in_parts, ["fail", "two"])
    assert "error: http 400: too long" in shown
    assert said(bodies[1]) == ["Be brief.", "two"]


def test_a_stopped_answer_stays_as_far_as_it_came() -> None:
    async def run() -> None:
        over, came = asyncio.Event(), asyncio.Event()

        async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
            writer.write(HEAD + part("Hel"))
            await over.wait()

        async with api_server(answer) as server, ApiClient(server.url) as client:
            conversation = Conversation(client=client, model="first")
            saying = asyncio.create_task(conversation.say("one", lambda _: came.set()))
            await came.wait()
            saying.cancel()
            await asyncio.gather(saying, return_exceptions=True)
            assert saying.cancelled()
            assert [message["content"] for message in conversation.messages] == ["one", "Hel"]
            over.set()

    asyncio.run(run())
