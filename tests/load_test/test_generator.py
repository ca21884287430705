"""The load generator before a server of which every byte is known."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from slipstream.runtime.api_client.client import ApiClient, read_api_key
from slipstream.runtime.api_client.errors import ApiError
from slipstream.runtime.api_client.events import MAX_LINE_BYTES, EventDecoder
from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.load_test.generator import LoadGenerator, LoadResult
from slipstream.runtime.load_test.main import run_load_test
from slipstream.runtime.load_test.plan import LoadPlan
from slipstream.sdk.errors import ConfigError
from slipstream.tests.fakes.api_server import HEAD, Answer, ApiServer, api_server, end, event, text, whole


async def three_pieces(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    pieces = [HEAD, text(""), text("a\u2028b"), text(""), text("c"), end(prompt_tokens=7, output_tokens=5)]
    writer.write(b"".join(pieces))


async def load(
    server: ApiServer, plan: LoadPlan, *, arrivals: Sequence[float] | None = None, calibrate: bool = False
) -> LoadResult:
    async with ApiClient(server.url, api_key="secret", max_connections=plan.concurrency) as client:
        generator = LoadGenerator(client, await client.first_model(), plan, clock=monotonic_clock)
        if calibrate:
            await generator.calibrate()
        return await generator.run(arrivals)


def test_closed_loop_counts_pieces_and_tokens_and_keeps_its_bound() -> None:
    async def run() -> None:
        async with api_server(three_pieces) as server:
            plan = LoadPlan(num_prompts=20, max_concurrency=3, prompt_tokens=30, output_tokens=5, seed=4)
            result = await load(server, plan, calibrate=True)
            assert [record.index for record in result.records] == list(range(20))
            for record in result.records:
                assert record.error is None, record
                assert (len(record.pieces_s), record.prompt_tokens, record.output_tokens) == (3, 7, 5)
                assert result.start_s <= record.due_s <= record.pieces_s[0] <= record.end_s <= result.end_s
            assert server.most_at_once <= 3
            assert set(server.keys) == {"Bearer secret"}
            assert {body["model"] for body in server.bodies} == {"first"}
            # The server counted two tokens a word: half as many words make what was asked for.
            assert {len(body["prompt"].split()) for body in server.bodies} == {15}
            assert len({body["prompt"] for body in server.bodies}) == 20
            assert {body["max_tokens"] for body in server.bodies} == {5}

    asyncio.run(run())


def test_open_loop_sends_what_is_due_though_nothing_has_been_answered() -> None:
    async def run() -> None:
        all_there = asyncio.Event()

        async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
            writer.write(HEAD + text("a"))
            if len(server.bodies) == 10:
                all_there.set()
            await all_there.wait()
            writer.write(text("b") + end(prompt_tokens=1, output_tokens=2))

        async with api_server(answer) as server:
            result = await load(server, LoadPlan(num_prompts=10, request_rate=1.0), arrivals=[0.0] * 10)
            assert server.most_at_once == 10
            assert all(record.error is None and record.due_s == result.start_s for record in result.records)

    asyncio.run(run())


def test_open_loop_waits_at_its_bound_and_the_wait_is_counted() -> None:
    async def run() -> None:
        async with api_server(three_pieces) as server:
            plan = LoadPlan(num_prompts=6, request_rate=1.0, max_concurrency=1)
            result = await load(server, plan, arrivals=[0.0] * 6)
            assert server.most_at_once == 1
            assert {record.due_s for record in result.records} == {result.start_s}
            firsts = [record.pieces_s[0] for record in result.records]
            assert firsts == sorted(firsts)

    asyncio.run(run())


async def refuse(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(whole(429, {"error": {"message": "the queue is full"}}))


async def break_off(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + text("a"))


async def fail_in_stream(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + text("a") + event({"error": {"message": "the engine failed"}}))


async def send_nonsense(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + b"data: {nonsense\n\n")


async def drop(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n")


@pytest.mark.parametrize(
    ("answer", "kind", "detail"),
    [
        (refuse, "http 429", "the queue is full"),
        (break_off, "stream broke off", "before its last event"),
        (fail_in_stream, "error in stream", "the engine failed"),
        (send_nonsense, "bad answer", "{nonsense"),
        (drop, "connection lost", ""),
    ],
)
def test_every_failure_is_counted_by_its_kind(answer: Answer, kind: str, detail: str) -> None:
    async def run() -> None:
        async with api_server(answer) as server:
            result = await load(server, LoadPlan(num_prompts=3))
            assert [record.error for record in result.records] == [kind] * 3
            assert all(detail in record.detail for record in result.records)

    asyncio.run(run())


def test_a_silent_server_meets_the_deadline() -> None:
    async def run() -> None:
        over = asyncio.Event()

        async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
            writer.write(HEAD + text("a"))
            await over.wait()

        async with api_server(answer) as server:
            result = await load(server, LoadPlan(num_prompts=2, request_timeout_s=0.2))
            assert [record.error for record in result.records] == ["deadline"] * 2
            over.set()

    asyncio.run(run())


def test_without_a_server_the_load_test_does_not_start() -> None:
    async def run() -> str:
        async with api_server(three_pieces) as server:
            return server.url

    url = asyncio.run(run())
    with pytest.raises(ApiError, match="no connection"):
        run_load_test(url, LoadPlan(), model=None, api_key_file=None, json_file=None)


def test_the_whole_load_test_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys, report = tmp_path / "keys", tmp_path / "reports" / "load.json"
    keys.write_text("# mine\nsecret\n", encoding="utf-8")

    async def run() -> None:
        async with api_server(three_pieces) as server:
            plan = LoadPlan(num_prompts=4)
            assert await asyncio.to_thread(
                run_load_test, f"{server.url}/v1/", plan, model="second", api_key_file=keys, json_file=report
            )

    asyncio.run(run())
    assert "4 of 4 requests" in capsys.readouterr().out
    content = json.loads(report.read_text(encoding="utf-8"))
    assert content["model"] == "second" and content["figures"]["output_tokens"] == 20


def test_wrong_addresses_and_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="base_url"):
        ApiClient("localhost:8000")
    with pytest.raises(ConfigError, match="api_key_file"):
        read_api_key(tmp_path / "none")


def test_events_come_out_whole_however_the_stream_is_cut() -> None:
    stream = b'data: {"a": "\xe2\x80\xa8"}\n\n: comment\r\ndata:x\r\n\r\ndata: [DONE]\n\n'
    expected = [b'{"a": "\xe2\x80\xa8"}', b"x", b"[DONE]"]
    for size in range(1, len(stream) + 1):
        decoder = EventDecoder()
        found = [data for at in range(0, len(stream), size) for data in decoder.feed(stream[at : at + size])]
        assert found == expected, size
    with pytest.raises(ValueError, match="longer than"):
        EventDecoder().feed(b"x" * (MAX_LINE_BYTES + 1))
